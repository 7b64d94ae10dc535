"""The slice end to end on one GPU that teacher and student share."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from support.run import metrics_of, train

pytestmark = pytest.mark.gpu
ON_GPU = {"teacher__device": "cuda", "student__device": "cuda"}
FP32 = {"teacher__dtype": "float32", "student__compute_dtype": "float32"}


def test_a_run_on_one_gpu(run_config) -> None:
    config = run_config(**ON_GPU, training__num_steps=12, training__eval_every=6, algorithm__ce_weight=0.1)
    result = train(config)
    assert result.returncode == 0, result.stderr
    steps, evals = metrics_of(config, "train"), metrics_of(config, "eval")
    assert [m["step"] for m in steps] == list(range(1, 13))
    assert [m["step"] for m in evals] == [0, 6, 12]
    assert all(math.isfinite(value) for m in (*steps, *evals) for value in m.values() if not isinstance(value, str))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert evals[-1]["kl"] < 0.8 * evals[0]["kl"]
    assert all(0.0 <= m["teacher_wait_s"] <= m["step_s"] for m in steps)
    assert AutoModelForCausalLM.from_pretrained(Path(config.output_dir, "model")).num_parameters() > 0


def test_gpu_and_cpu_agree(run_config, tmp_path: Path) -> None:
    """The same job in float32: losses within 0.1% over the first steps."""
    on_gpu = run_config(output_dir=tmp_path / "gpu", **FP32, **ON_GPU)
    on_cpu = run_config(output_dir=tmp_path / "cpu", **FP32, teacher__device="cpu", student__device="cpu")
    for config in (on_gpu, on_cpu):
        result = train(config)
        assert result.returncode == 0, result.stderr
    for kind, name in (("train", "loss"), ("eval", "kl"), ("eval", "ce_loss")):
        gpu, cpu = ([m[name] for m in metrics_of(c, kind)] for c in (on_gpu, on_cpu))
        assert gpu == pytest.approx(cpu, rel=1e-3), name


def test_resume_goes_on_with_the_same_numbers(run_config, tmp_path: Path) -> None:
    """Within 0.1%: some CUDA kernels add in an order that differs from run to run."""
    options = {**ON_GPU, **FP32, "optimizer__schedule": "constant", "training__samples_per_step": 6}
    straight = run_config(output_dir=tmp_path / "straight", training__num_steps=8, **options)
    first = run_config(output_dir=tmp_path / "stopped", training__num_steps=4, **options)
    second = run_config(output_dir=tmp_path / "stopped", training__num_steps=8, **options)
    for config, more in ((straight, ()), (first, ()), (second, ("--resume=true",))):
        result = train(config, *more)
        assert result.returncode == 0, result.stderr
    losses = [[m["loss"] for m in metrics_of(c, "train")] for c in (straight, second)]
    assert len(losses[1]) == 8
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
