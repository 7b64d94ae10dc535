"""Verdicts on two stored runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from bench import compare
from bench.environment import environment
from bench.model import Role, Row
from bench.output import write_results
from bench.timing import quantile

STEADY = (0.98, 0.99, 1.0, 1.01, 1.02)


def row(provider: str, seconds: Sequence[float], role: Role = "peer", **fields: object) -> Row:
    values = {
        "median_s": quantile(seconds, 0.5) if seconds else None,
        "p20_s": quantile(seconds, 0.2) if seconds else None,
        "p80_s": quantile(seconds, 0.8) if seconds else None,
        "status": "ok" if seconds else "unavailable",
        **fields,
    }
    return Row(
        suite="s",
        case="c",
        params={},
        provider=provider,
        role=role,
        seconds=tuple(seconds),
        **values,  # type: ignore[arg-type]
    )


def times(factor: float, seconds: Sequence[float] = STEADY) -> tuple[float, ...]:
    return tuple(factor * value for value in seconds)


def verdict(before: Sequence[float], after: Sequence[float]) -> str:
    (change,) = compare.changes([row("p", before)], [row("p", after)])
    return change.verdict


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (times(1.01), "noise"),
        (times(0.5), "50% faster"),
        (times(1.5), "50% slower"),
        ((0.5, 0.7, 0.9, 1.3, 1.9), "noise"),  # a far-off median, but a wide spread
        ((0.5, 0.5), "unclear: fewer than 3 repetitions"),
        ((), "ok -> unavailable"),
    ],
)
def test_verdict(after: Sequence[float], expected: str) -> None:
    assert verdict(STEADY, after) == expected


def test_a_slower_machine_cancels_through_the_floor() -> None:
    def both(machine: float, provider: float) -> list[Row]:
        return [
            row("floor", times(machine), "floor", floor="floor"),
            row("p", times(2 * machine * provider), floor="floor"),
        ]

    floor, same = compare.changes(both(1.0, 1.0), both(1.6, 1.0))
    assert floor.verdict == "60% slower"
    assert same.verdict == "noise"
    assert same.ratio == pytest.approx(1.0)
    assert compare.changes(both(1.0, 1.0), both(1.6, 0.5))[1].verdict == "50% faster"


def test_rows_of_one_run_only_and_memory() -> None:
    before = [row("gone", STEADY), row("p", STEADY, peak_mib=100.0), row("q", STEADY, peak_mib=100.0)]
    after = [row("new", STEADY), row("p", STEADY, peak_mib=103.0), row("q", STEADY, peak_mib=400.0)]
    found = {change.provider: change for change in compare.changes(before, after)}
    assert (found["new"].verdict, found["gone"].verdict) == ("added", "gone")
    assert (found["p"].memory, found["q"].memory) == ("same", "100 -> 400 MiB")


def test_two_files_printed(tmp_path: Path) -> None:
    machine = environment(device="cpu", num_threads=2)
    before, after = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_results(before, machine, [row("p", STEADY)])
    write_results(after, {**machine, "num_threads": 4}, [row("p", times(0.5))])
    console = Console(width=200, record=True, quiet=False)
    assert compare.main(before, after, console) == 0
    text = console.export_text()
    assert "threads: 2 -> 4" in text
    assert "50% faster" in text
