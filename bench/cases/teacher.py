"""``bench teacher``: prefill into the ring beside the bare forward of the same decoder.

One repetition prefills all microbatches of a few steps of the job and hands the rows of the loss to
a student that only takes them. The floor is the same decoder over the same microbatches in one
process, capturing nothing: what it costs to capture rows, to hand them over and to be asked for
them is 100% less the percent of the floor. The student's side runs in the worker itself.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace

from bench.cases.e2e_shapes import QWEN3_0_6B, QWEN3_1_7B, QWEN3_4B
from bench.model import Case, Provider

MODULE = "bench.cases.teacher_providers"
PROVIDERS = (
    Provider("decoder alone", f"{MODULE}:decoder", "floor"),
    Provider("kdflow teacher, hf", f"{MODULE}:hf", "ours"),
    Provider("kdflow teacher, sglang", f"{MODULE}:sglang", "ours"),
    Provider("all layers' hidden states, Queue", f"{MODULE}:all_layers_through_queue"),
)
SGLANG = "bench.cases.teacher_sglang"
SGLANG_PROVIDERS = (
    Provider("SGLang, bare prefill", f"{SGLANG}:bare", "floor"),
    Provider("kdflow teacher, sglang", f"{SGLANG}:captured", "ours"),
    Provider("SGLang, return_hidden_states", f"{SGLANG}:stock"),
)
NUM_PROMPTS, LENGTH = 16, 512


def cases(*, device: str, quick: bool) -> list[Case]:
    """The teacher of the quickstart on a CPU, one of Qwen3-4B's shape with random weights on a GPU."""
    found = [_job_case(device, quick)]
    if not quick and importlib.util.find_spec("sglang") is not None:
        found.append(_capture_case(device))
    return found


def _job_case(device: str, quick: bool) -> Case:
    on_gpu = device.startswith("cuda")
    steps = 1 if quick else 3
    name = "Qwen3-4B, random weights" if on_gpu else "SmolLM2-135M"
    return Case(
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
        providers=tuple(p for p in PROVIDERS if on_gpu or not quick or "sglang" not in p.name),
        work=0.0,  # tokens: each repetition says how many
        unit="token",
        worker_mib=1500,
        measures_memory=False,
        budget_scale=2.0,
        setup_timeout_s=300.0,
    )


def _capture_case(device: str) -> Case:
    """One layer on a CPU, which makes capture a larger part of the whole than a full model would."""
    layers = QWEN3_1_7B["num_hidden_layers"] if device.startswith("cuda") else 1
    env = () if device.startswith("cuda") else (("SGLANG_USE_CPU_ENGINE", "1"),)
    shape = {**QWEN3_1_7B, "num_hidden_layers": layers, "vocab_size": 32768}
    return Case(
        suite="teacher",
        name=f"capture of {NUM_PROMPTS} x {LENGTH} tokens, H={shape['hidden_size']}, {layers} of 28 layers",
        params={"models": {"teacher": shape}, "device": device, "num_prompts": NUM_PROMPTS, "length": LENGTH},
        providers=tuple(replace(p, env=env) for p in SGLANG_PROVIDERS),
        work=NUM_PROMPTS * LENGTH,
        unit="token",
        worker_mib=4000,
        measures_memory=False,
        budget_scale=4.0,
        setup_timeout_s=300.0,
    )
