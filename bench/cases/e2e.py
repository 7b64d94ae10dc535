"""``bench e2e``: the main job beside TRL's GKDTrainer and a hand-written full-logit loop.

The job of ``examples/quickstart.yaml``: the same pair of models, the same samples in the same
order, as many to a step, the same optimizer and dtypes. One repetition is a run of its own from
the start of its process: a few steps to warm up, the measured ones, a few more so that a teacher
that runs ahead does not get to rest inside the measurement. The floor is all matrix products of
the measured steps alone, on the same tokens without padding.
"""

from __future__ import annotations

from bench.model import Case, Provider

MODULE = "bench.cases.e2e_providers"
PROVIDERS = (
    Provider("GEMMs of the step", f"{MODULE}:gemms", "floor"),
    Provider("kdflow train", f"{MODULE}:kdflow", "ours"),
    Provider("trl GKDTrainer", f"{MODULE}:trl"),
    Provider("trl GKDTrainer, 4 x 1", f"{MODULE}:trl_one_by_one"),
    Provider("eager loop", f"{MODULE}:eager"),
)


def cases(*, device: str, quick: bool, config: str = "examples/quickstart.yaml") -> list[Case]:
    """One case: what ``config`` describes, in the dtypes it resolves to on ``device``."""
    measured = 1 if quick else 3
    name = config.rpartition("/")[2].removesuffix(".yaml")
    # Shorter samples and fewer of them: another job, for trying the suite out.
    overrides = ["--data.max_length=192", "--training.samples_per_step=2"] if quick else []
    return [
        Case(
            suite="e2e",
            name=f"{name}, {measured} step{'s' if measured > 1 else ''}",
            params={
                "config": config,
                "device": device,
                "overrides": overrides,
                "num_warm_up_steps": 1,
                "num_measured_steps": measured,
                "num_tail_steps": 2,
            },
            providers=tuple(p for p in PROVIDERS if not (quick and p.name.endswith("4 x 1"))),
            work=0.0,  # tokens, known once they are tokenised: each repetition says how many
            unit="token",
            worker_mib=3500,
            measures_memory=False,
            warm_up=False,
            budget_scale=5.0,
            warm_up_timeout_s=900.0,
        )
    ]
