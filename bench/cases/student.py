"""``bench student``: kdflow's step beside a bare loop around the same model and batches.

One repetition trains a few steps of the job from teacher rows that are there already: forward, loss,
backward, clipping, AdamW. The floor is that loop written out around a copy of the model in the
compute dtype, with fp32 master weights: no FSDP, no trainer, no metrics. What kdflow adds is 100%
less the percent of the floor. The other rows say what packing is worth: the same steps with the
samples of a microbatch padded to the longest, and a model under autocast as one usually writes it.

Its other cases are packing alone: steps of 4 (the quickstart's own), 16 and 32 samples, each as one packed microbatch
and as one batch padded to the longest sample, tokens/s of the samples' own tokens. The loss gets the same rows of both;
the last provider gives it all positions of the padded batch, masked afterwards, as where a model's own logits are used.
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
LONGEST = 1024  # no sample of either config is longer
PACKING = (
    *PROVIDERS[:2],
    Provider("bare loop, one padded batch", f"{MODULE}:padded_batches"),
    Provider("bare loop, one padded batch, every position in the loss", f"{MODULE}:padded_logits"),
)


def cases(*, device: str, quick: bool) -> list[Case]:
    """The student of the quickstart on a CPU, one of Qwen3-0.6B's shape with random weights on a GPU."""
    on_gpu = device.startswith("cuda")
    steps = 1 if quick else 2
    name = "Qwen3-0.6B, random weights" if on_gpu else "SmolLM2-135M cut to 10 layers"
    # A step of few short samples is enough to try it out.
    small = ["--data.max_length=192", "--training.samples_per_step=2"]

    def case(title: str, providers: tuple[Provider, ...], num_steps: int, overrides: list[str]) -> Case:
        return Case(
            suite="student",
            name=f"{name}, {title}",
            params={
                "config": "bench/cases/e2e_gpu.yaml" if on_gpu else "examples/quickstart.yaml",
                "models": {"teacher": QWEN3_4B, "student": QWEN3_0_6B} if on_gpu else {},
                "device": device,
                "overrides": overrides,
                "num_warm_up_steps": 0,
                "num_measured_steps": num_steps,
                "peer_batch_size": 0,
            },
            providers=providers,
            work=0.0,  # tokens: each repetition says how many
            unit="token",
            worker_mib=2500,
            measures_memory=False,
            budget_scale=2.0,
            setup_timeout_s=300.0,
        )

    whole = f"{steps} step{'s' if steps > 1 else ''}"
    found = [case(whole, PROVIDERS, steps, small if quick and not on_gpu else [])]
    if not quick:
        for size in (4, 16, 32):
            title = f"packing, {size} samples"
            overrides = [f"--training.samples_per_step={size}", f"--training.tokens_per_microbatch={size * LONGEST}"]
            found.append(case(title, PACKING, max(1, 16 // size), overrides))
    return found
