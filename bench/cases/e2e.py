"""``bench e2e``: the main job beside TRL's GKDTrainer and a hand-written full-logit loop.

On a CPU the job of ``examples/quickstart.yaml``, real models and all; on a GPU that of
``e2e_gpu.yaml``, models of real shapes with random weights. All providers get the same pair of
models, the same samples in the same order, as many to a step, the same optimizer and dtypes. One
repetition is a run of its own from the start of its process: a few steps to warm up, the measured
ones, a few more so that a teacher that runs ahead does not get to rest inside the measurement. The
floor is all matrix products of the measured steps alone, on the same tokens without padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.cases.e2e_shapes import QWEN3_0_6B, QWEN3_1_7B, QWEN3_4B
from bench.model import Case, Provider

MODULE = "bench.cases.e2e_providers"
# As many as a ring has slots: a teacher that far ahead must not run out of microbatches before the measured steps end,
# or these would not have all of its work beside them.
TAIL_STEPS = 4
PROVIDERS = (
    Provider("GEMMs of the step", f"{MODULE}:gemms", "floor"),
    Provider("kdflow train", f"{MODULE}:kdflow", "ours"),
    Provider("trl GKDTrainer", f"{MODULE}:trl"),
    Provider("trl GKDTrainer, 4 x 1", f"{MODULE}:trl_one_by_one"),
    Provider("eager loop", f"{MODULE}:eager"),
)


def cases(*, device: str, quick: bool, config: str = "examples/quickstart.yaml") -> list[Case]:
    """One case, in the dtypes that its config resolves to on ``device``."""
    if device.startswith("cuda"):
        # The smaller teacher is made and loaded in a time that `bench gpu` has.
        teacher = QWEN3_1_7B if quick else QWEN3_4B
        return [gpu_case(device, quick=quick, models={"teacher": teacher, "student": QWEN3_0_6B})]
    return [_cpu_case(device, quick, config)]


def gpu_case(device: str, *, quick: bool, models: Mapping[str, Mapping[str, Any]], overrides: tuple = ()) -> Case:
    """The peers pad, so they take the samples of a step in batches of four, of at most as many
    tokens as a microbatch: more would not fit beside their logits."""
    measured = 3 if quick else 10
    return Case(
        suite="e2e",
        name=f"Qwen3-{'1.7B' if quick else '4B'} to 0.6B, random weights, {measured} steps",
        params={
            "config": "bench/cases/e2e_gpu.yaml",
            "models": models,
            "device": device,
            "overrides": list(overrides),
            "num_warm_up_steps": 2 if quick else 3,
            "num_measured_steps": measured,
            "num_tail_steps": TAIL_STEPS,
            "peer_batch_size": 4,
            "stop_when_measured": True,  # saving 9 GB at the end is another job
        },
        providers=tuple(p for p in PROVIDERS if not p.name.endswith("4 x 1")),
        work=0.0,
        unit="token",
        worker_mib=2000,
        measures_memory=False,
        warm_up=False,
        budget_scale=1.0,
        setup_timeout_s=300.0,
        warm_up_timeout_s=600.0,
    )


def _cpu_case(device: str, quick: bool, config: str) -> Case:
    measured = 1 if quick else 3
    name = config.rpartition("/")[2].removesuffix(".yaml")
    # Shorter samples and fewer of them: another job, for trying the suite out.
    overrides = ["--data.max_length=192", "--training.samples_per_step=2"] if quick else []
    return Case(
        suite="e2e",
        name=f"{name}, {measured} step{'s' if measured > 1 else ''}",
        params={
            "config": config,
            "models": {},
            "device": device,
            "overrides": overrides,
            "num_warm_up_steps": 1,
            "num_measured_steps": measured,
            "num_tail_steps": TAIL_STEPS,
            "peer_batch_size": 0,  # the whole step
            "stop_when_measured": False,
        },
        providers=tuple(p for p in PROVIDERS if not (quick and p.name.endswith("4 x 1"))),
        work=0.0,  # tokens, known once they are tokenised: each repetition says how many
        unit="token",
        worker_mib=3500,
        measures_memory=False,
        warm_up=False,
        budget_scale=1.0 if quick else 5.0,  # one run each is enough to try it out
        warm_up_timeout_s=900.0,
    )
