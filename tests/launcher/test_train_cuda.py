"""The slice end to end on one GPU that teacher and student share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kdflow.config import TeacherConfig
from kdflow.config_file import load_config
from kdflow.teacher import TEACHERS
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


@pytest.fixture(scope="module")
def on_cpu(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return small_run(tiny, tmp_path_factory.mktemp("cpu"), teacher="cpu", student="cpu", placement="auto")


def small_run(
    tiny: Path,
    folder: Path,
    *,
    teacher: str,
    student: str,
    placement: str,
    schedule: str = "overlap",
    more: Mapping[str, object] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Losses and evaluations of four steps in float32."""
    options = {
        "output_dir": folder / "run",
        "teacher.model": tiny / "teacher",
        "student.model": tiny / "student",
        "data.train": tiny / "conversations.jsonl",
        "data.num_eval_samples": 4,
        "data.max_length": 128,
        "training.num_steps": 4,
        "training.samples_per_step": 8,
        "training.tokens_per_microbatch": 256,
        "optimizer.learning_rate": 3e-3,
        "teacher.dtype": "float32",
        "student.compute_dtype": "float32",
        "teacher.device": teacher,
        "student.device": student,
        "transport.placement": placement,
        "transport.schedule": schedule,
        **more,
    }
    config = load_config(None, [f"--{name}={value}" for name, value in options.items()])
    result = train(config)
    assert result.returncode == 0, result.stderr
    names = (("train", "loss"), ("eval", "kl"), ("eval", "ce_loss"))
    return {f"{kind} {name}": [m[name] for m in metrics_of(config, kind)] for kind, name in names}


@pytest.mark.parametrize(
    ("teacher", "student", "placement"),
    [
        ("cuda", "cuda", "device"),
        ("cuda", "cuda", "pinned"),
        ("cuda", "cuda", "host"),
        ("cpu", "cuda", "auto"),
        ("cuda", "cpu", "auto"),
    ],
)
def test_devices_and_rings_agree_with_the_cpu(
    tiny: Path, tmp_path: Path, on_cpu: dict[str, list[float]], teacher: str, student: str, placement: str
) -> None:
    """The same job in float32: losses within 0.1% over the first steps."""
    found = small_run(tiny, tmp_path, teacher=teacher, student=student, placement=placement)
    for name, values in on_cpu.items():
        assert found[name] == pytest.approx(values, rel=1e-3), name


def test_turns_agree_with_the_cpu(tiny: Path, tmp_path: Path, on_cpu: dict[str, list[float]]) -> None:
    found = small_run(tiny, tmp_path, teacher="cuda", student="cuda", placement="auto", schedule="colocate")
    for name, values in on_cpu.items():
        assert found[name] == pytest.approx(values, rel=1e-3), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": "selective"},
        {"cpu_offload": True, "activation_checkpointing": "full"},
        {"replicate": 2},
        {"context_parallel": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_two_gpus_agree_with_the_cpu(
    tiny: Path, tmp_path: Path, on_cpu: dict[str, list[float]], options: dict[str, object]
) -> None:
    more = {"student.num_ranks": 2, **{f"student.{name}": value for name, value in options.items()}}
    found = small_run(tiny, tmp_path, teacher="cuda", student="cuda", placement="auto", more=more)
    for name, values in on_cpu.items():
        assert found[name] == pytest.approx(values, rel=1e-3), name


def test_a_teacher_that_sleeps_leaves_the_gpu_and_wakes_as_it_was(tiny: Path) -> None:
    config = TeacherConfig(model=str(tiny / "teacher"), dtype="float32", device="cuda")
    teacher = TEACHERS.get("hf")(config, gpu=0, sleeps=True)
    samples = [np.arange(20, dtype=np.int32)]
    before, awake = teacher.hidden_rows(samples), torch.cuda.memory_allocated()
    teacher.sleep()
    num_bytes = (tiny / "teacher" / "model.safetensors").stat().st_size
    assert awake - torch.cuda.memory_allocated() > 0.9 * num_bytes
    teacher.wake_up()
    assert torch.equal(teacher.hidden_rows(samples)[0], before[0])
    teacher.close()


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
