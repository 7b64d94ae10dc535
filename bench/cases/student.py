"""``bench student``: kdflow's step beside a bare loop around the same model and batches.

One repetition trains a few steps of the job from teacher rows that are there already: forward, loss,
backward, clipping, AdamW. The floor is that loop written out around a copy of the model in the
compute dtype, with fp32 master weights: no FSDP, no trainer, no metrics. What kdflow adds is 100%
less the percent of the floor. The other rows say what packing is worth: the same steps with the
samples of a microbatch padded to the longest, and a model under autocast as one usually writes it.
"""

from __future__ import annotations

from bench.cases.e2e_shapes import QWEN3_0_6B, QWEN3_4B
from bench.model import Case, Provider

MODULE = "bench.cases.student_providers"
PROVIDERS = (
    Provider("bare loop, packed", f"{MODULE}:packed", "floor"),
    Provider("kdflow student", f"{MODULE}:kdflow", "ours"),
    Provider("bare loop, padded", f"{MODULE}:padded"),
    Provider("autocast loop, packed", f"{MODULE}:autocast"),
)


def cases(*, device: str, quick: bool) -> list[Case]:
    """The student of the quickstart on a CPU, one of Qwen3-0.6B's shape with random weights on a GPU."""
    on_gpu = device.startswith("cuda")
    steps = 1 if quick else 2
    name = "Qwen3-0.6B, random weights" if on_gpu else "SmolLM2-135M cut to 10 layers"
    # A step of few short samples is enough to try it out.
    small = ["--data.max_length=192", "--training.samples_per_step=2"]
    return [
        Case(
            suite="student",
            name=f"{name}, {steps} step{'s' if steps > 1 else ''}",
            params={
                "config": "bench/cases/e2e_gpu.yaml" if on_gpu else "examples/quickstart.yaml",
                "models": {"teacher": QWEN3_4B, "student": QWEN3_0_6B} if on_gpu else {},
                "device": device,
                "overrides": small if quick and not on_gpu else [],
                "num_warm_up_steps": 0,
                "num_measured_steps": steps,
                "peer_batch_size": 0,
            },
            providers=PROVIDERS,
            work=0.0,  # tokens: each repetition says how many
            unit="token",
            worker_mib=2500,
            measures_memory=False,
            budget_scale=2.0,
            setup_timeout_s=300.0,
        )
    ]
