"""``bench teacher``: prefill into the ring beside the bare forward of the same decoder.

One repetition prefills all microbatches of a few steps of the job and hands the rows of the loss to
a student that only takes them. The floor is the same decoder over the same microbatches in one
process, capturing nothing: what it costs to capture rows, to hand them over and to be asked for
them is 100% less the percent of the floor. The student's side runs in the worker itself.
"""

from __future__ import annotations

from bench.cases.e2e_shapes import QWEN3_0_6B, QWEN3_4B
from bench.model import Case, Provider

MODULE = "bench.cases.teacher_providers"
PROVIDERS = (
    Provider("decoder alone", f"{MODULE}:decoder", "floor"),
    Provider("kdflow teacher, hf", f"{MODULE}:hf", "ours"),
    Provider("kdflow teacher, sglang", f"{MODULE}:sglang", "ours"),
    Provider("all layers' hidden states, Queue", f"{MODULE}:all_layers_through_queue"),
)


def cases(*, device: str, quick: bool) -> list[Case]:
    """The teacher of the quickstart on a CPU, one of Qwen3-4B's shape with random weights on a GPU."""
    on_gpu = device.startswith("cuda")
    steps = 1 if quick else 3
    name = "Qwen3-4B, random weights" if on_gpu else "SmolLM2-135M"
    return [
        Case(
            suite="teacher",
            name=f"{name}, {steps} step{'s' if steps > 1 else ''} of its job",
            params={
                "config": "bench/cases/e2e_gpu.yaml" if on_gpu else "examples/quickstart.yaml",
                "models": {"teacher": QWEN3_4B, "student": QWEN3_0_6B} if on_gpu else {},
                "device": device,
                "overrides": [],
                "num_warm_up_steps": 0,
                "num_measured_steps": steps,
                "peer_batch_size": 0,
            },
            providers=tuple(p for p in PROVIDERS if on_gpu or "sglang" not in p.name),
            work=0.0,  # tokens: each repetition says how many
            unit="token",
            worker_mib=1500,
            measures_memory=False,
            budget_scale=2.0,
            setup_timeout_s=300.0,
        )
    ]
