"""`transport.schedule: colocate`: teachers sleep while the student trains, and no number changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdflow.training.turns import windows
from support.run import metrics_of, train
from support.timeline import assert_turns

EXACT = {"teacher__dtype": "float32", "student__compute_dtype": "float32"}
JOB = {"training__num_steps": 6, "training__eval_every": 3, "training__tokens_per_microbatch": 128}


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["ab", "cd", "e"], ["abcd", "e"]),
        (["abc", "de", "fg"], ["abc", "defg"]),
        (["a", "", "bcdefghijk", "l"], ["a", "bcde", "fghi", "jkl"]),
        (["abcd", "efgh"], ["abcd", "efgh"]),
        ([], []),
    ],
)
def test_windows_are_whole_steps_where_they_fit(pieces: list[str], expected: list[str]) -> None:
    assert ["".join(window) for window in windows(pieces, 4)] == expected  # type: ignore[arg-type]


def numbers(config) -> list[list[float]]:
    found = [[m["loss"], m["grad_norm"]] for m in metrics_of(config, "train")]
    return found + [[m["kl"], m["top1_agreement"]] for m in metrics_of(config, "eval")]


@pytest.mark.parametrize("processes", [1, 2])
def test_turns_change_no_number(run_config, tmp_path: Path, processes: int) -> None:
    """Of one teacher and one rank, and of two each; a turn is of a step or two, an evaluation of one for itself."""
    both = {"student__num_ranks": processes, "teacher__num_workers": processes, **EXACT, **JOB}
    overlap = run_config(output_dir=tmp_path / "overlap", **both)
    colocate = run_config(
        output_dir=tmp_path / "colocate",
        transport__schedule="colocate",
        transport__num_slots=5,
        profile__timeline=True,
        **both,
    )
    for config in (overlap, colocate):
        result = train(config)
        assert result.returncode == 0, result.stderr
    assert numbers(colocate) == numbers(overlap)  # to the bit
    assert_turns(Path(colocate.output_dir, "profile", "timeline.json"), processes)
    assert all(m["teacher_wait_s"] >= 0 for m in metrics_of(colocate, "train"))
    assert any(m["teacher_wait_s"] > 0 for m in metrics_of(colocate, "train"))
