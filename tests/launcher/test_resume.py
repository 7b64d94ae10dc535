"""What kill -9 leaves of a run, and that it goes on as if nothing had been."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdflow.config import RunConfig
from kdflow.config_file import dump_config
from kdflow.student import CheckpointFolder, read_weights
from support.processes import Spawned
from support.run import metrics_of
from support.tiny import with_dropout

STEPS_OF_A_KILL = 10  # more than any one lasts
SEED = 8


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


@pytest.fixture
def killed_as_if_straight(run_config, tiny: Path, tmp_path: Path):
    """A function that runs one job straight and killed, with dropout and two weighted datasets; it compares them."""
    rows = (tiny / "conversations.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    sources = [{"source": str(tmp_path / f"{name}.jsonl"), "weight": weight} for name, weight in (("a", 3), ("b", 1))]
    for source, part in zip(sources, (rows[:25], rows[25:]), strict=True):
        Path(source["source"]).write_text("".join(part), encoding="utf-8")
    model = with_dropout(tiny / "student", tmp_path / "model")

    def run(num_kills: int, **options: object) -> None:
        straight, killed = (
            run_config(
                output_dir=tmp_path / name,
                student__model=model,
                data__train=json.dumps(sources),
                data__num_eval_samples=0,
                training__num_steps=STEPS_OF_A_KILL * num_kills,
                training__save_every=2,
                **options,
            )
            for name in ("straight", "killed")
        )
        files = [str(Path(c.output_dir).with_suffix(".yaml")) for c in (straight, killed)]
        for config, file in zip((straight, killed), files, strict=True):
            Path(file).write_text(dump_config(config), encoding="utf-8")
        process = Spawned("support.killed:run_straight_and_killed", *files, num_kills, SEED)
        num_half_written = json.loads(process.line(timeout_s=280.0 if num_kills < 20 else 1100.0))
        assert process.join() == 0
        assert num_half_written > 0 or num_kills == 1  # every other one waits for such a moment
        assert_same_run(straight, killed)
        assert [p.name for p in Path(killed.output_dir, "checkpoints").iterdir()] == [
            f"step-{killed.training.num_steps:06d}"
        ]

    return run


soak = (pytest.mark.soak, pytest.mark.timeout(1200))


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("num_kills", [4, pytest.param(20, marks=soak)])
def test_kills_change_nothing(killed_as_if_straight, num_ranks: int, num_kills: int) -> None:
    """float32; checkpoints are written nearly all the time. Of two ranks one is killed, or both."""
    killed_as_if_straight(
        num_kills,
        algorithm__name="sft",
        student__compute_dtype="float32",
        student__num_ranks=num_ranks,
        training__samples_per_step=2,
    )


@pytest.mark.parametrize(
    "num_kills, dtype",
    [(1, "bfloat16"), pytest.param(20, "bfloat16", marks=soak), pytest.param(20, "float32", marks=soak)],
)
def test_distillation_goes_on_after_kills(killed_as_if_straight, num_kills: int, dtype: str) -> None:
    """Up to four microbatches are under way at the teacher when the student is killed, and die with it."""
    killed_as_if_straight(
        num_kills,
        student__compute_dtype=dtype,
        teacher__dtype=dtype,
        training__tokens_per_microbatch=128,
        transport__num_slots=4,
    )
