"""What kill -9 leaves of a run, and that it goes on as if nothing had been."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch

from kdflow.config import RunConfig, dump_config
from kdflow.student import CheckpointFolder, read_weights
from support.processes import Spawned
from support.run import command, metrics_of, train
from support.tiny import with_dropout


def assert_same_run(one: RunConfig, other: RunConfig) -> None:
    """Losses of every step, told once each, and the weights of the last checkpoint, to the bit."""
    steps = [[(m["step"], m["loss"], m["grad_norm"]) for m in metrics_of(c, "train")] for c in (one, other)]
    assert [step for step, *_ in steps[0]] == list(range(1, one.training.num_steps + 1))
    assert steps[0] == steps[1]
    found = [CheckpointFolder(Path(c.output_dir, "checkpoints")).find(None) for c in (one, other)]
    assert found[0].path.name == found[1].path.name
    weights = [read_weights(c.path, torch.float32) for c in found]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def run_killed(config: RunConfig, num_kills: int) -> int:
    path = Path(config.output_dir).with_suffix(".yaml")
    path.write_text(dump_config(config), encoding="utf-8")
    process = Spawned("support.killed:run_killed", str(path), num_kills, 8)
    num_half_written = json.loads(process.line(timeout_s=240.0))
    assert process.join() == 0
    return num_half_written


def test_twenty_kills_change_nothing(run_config, tiny: Path, tmp_path: Path) -> None:
    """float32 and dropout; checkpoints are written nearly all the time."""
    options = {
        "algorithm__name": "sft",
        "student__model": with_dropout(tiny / "student", tmp_path / "model"),
        "student__compute_dtype": "float32",
        "data__num_eval_samples": 0,
        "training__samples_per_step": 2,
        "training__num_steps": 160,
        "training__save_every": 2,
    }
    straight, killed = (run_config(output_dir=tmp_path / name, **options) for name in ("straight", "killed"))
    run_killed(straight, 0)
    assert run_killed(killed, 20) > 0
    assert_same_run(straight, killed)
    assert [p.name for p in Path(killed.output_dir, "checkpoints").iterdir()] == ["step-000160"]


def test_distillation_goes_on_after_kill(run_config, tiny: Path, tmp_path: Path) -> None:
    """bfloat16, dropout, four microbatches under way at the teacher when it is killed."""
    options = {
        "student__model": with_dropout(tiny / "student", tmp_path / "model"),
        "student__compute_dtype": "bfloat16",
        "training__tokens_per_microbatch": 128,
        "training__num_steps": 20,
        "training__save_every": 3,
        "transport__num_slots": 4,
    }
    straight, killed = (run_config(output_dir=tmp_path / name, **options) for name in ("straight", "killed"))
    assert train(straight).returncode == 0
    with subprocess.Popen(command(killed), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 10/"):
                break
        process.kill()
    result = train(killed, "--resume=true")
    assert result.returncode == 0, result.stderr
    assert "step 20/20" in result.stdout
    assert "step 1/20" not in result.stdout
    assert_same_run(straight, killed)
