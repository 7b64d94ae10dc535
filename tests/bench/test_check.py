"""``bench check``: ratios against stored ones."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from bench import check, cli
from bench.model import Row
from bench.timing import quantile


def rows(ours: Sequence[float], floor: Sequence[float] = (1.0, 1.1, 0.9)) -> list[Row]:
    def row(name: str, role: str, seconds: Sequence[float]) -> Row:
        median = quantile(seconds, 0.5) if seconds else None
        return Row("s", "c", {}, name, role, "ok", seconds=tuple(seconds), median_s=median, floor="f")  # type: ignore[arg-type]

    return [row("f", "floor", floor), row("kdflow", "ours", ours)]


STORED = {"s: c: kdflow": {"ratio": 1.5, "fails_at": 2.0}}


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ((1.5, 1.6, 1.4), "ok"),
        ((2.2, 2.5, 2.0), "worse"),
        ((4.0, 4.4, 3.6), "failed"),
        ((4.0, 1.6, 1.4), "ok"),  # one bad repetition is no regression
        ((0.8, 0.9, 0.7), "better"),
        ((), "missing"),
    ],
)
def test_verdicts(ours: Sequence[float], verdict: str) -> None:
    (finding,) = check.judge(rows(ours), STORED)
    assert finding.verdict == verdict


def test_a_slow_machine_is_no_regression() -> None:
    (finding,) = check.judge(rows((15.0, 16.0, 14.0), floor=(10.0, 11.0, 9.0)), STORED)
    assert finding.verdict == "ok"
    assert finding.found == pytest.approx(1.5, abs=0.06)


def test_exit_code_and_update(tmp_path: Path) -> None:
    path, out = tmp_path / "check.json", io.StringIO()
    console = Console(file=out, width=160)
    assert check.conclude(rows((1.5, 1.6, 1.4)), console, update=False, path=path) == 0
    assert "new" in out.getvalue()
    assert check.conclude(rows((1.5, 1.6, 1.4)), console, update=True, path=path) == 0
    stored = json.loads(path.read_text())
    assert stored[check.kind_of_cpu()]["s: c: kdflow"]["ratio"] == pytest.approx(1.5, abs=0.06)
    stored[check.kind_of_cpu()]["s: c: kdflow"]["fails_at"] = 3.0
    stored["another kind"] = {"x": {"ratio": 1.0, "fails_at": 2.0}}
    path.write_text(json.dumps(stored))
    assert check.conclude(rows((4.0, 4.4, 3.6)), console, update=False, path=path) == 0  # below the factor of three
    assert check.conclude(rows((8.0, 8.8, 7.2)), console, update=False, path=path) == 1
    assert check.conclude(rows(()), console, update=False, path=path) == 1
    assert check.conclude(rows((1.0, 1.0, 1.0)), console, update=True, path=path) == 0
    again = json.loads(path.read_text())
    assert again["another kind"] == stored["another kind"]
    assert again[check.kind_of_cpu()]["s: c: kdflow"]["fails_at"] == 3.0


def test_the_stored_file_names_cases_that_exist() -> None:
    known = {f"{c.suite}: {c.name}: {p.name}" for c in check.cases() for p in c.providers if p.role == "ours"}
    assert {case.suite for case in check.cases()} == {"loss", "ring", "teacher", "student"}
    stored = check.read_stored()
    assert stored
    for kind, ratios in stored.items():
        assert kind in ("with native bf16", "without native bf16")
        for name, values in ratios.items():
            assert name.partition(":")[0] == "loss" or name in known  # the loss's dtype is that of the kind
            assert 0 < values["ratio"] < 20
            assert values["fails_at"] > 1


def test_only_the_check_is_quick_by_itself() -> None:
    """It has no such option, and its default is nobody else's."""
    parser = cli._parser()
    assert [parser.parse_args([name]).quick for name in ("check", "loss", "student")] == [True, False, False]
    assert parser.parse_args(["student", "--quick"]).quick
