"""``bench compare A B``: what changed between two result files, and what is only noise.

Where both runs measured a floor for a case, times are first divided by their own run's floor: the
machine's drift between the runs cancels. The spread of such a ratio reaches from the row's p20 over
the floor's p80 to the row's p80 over the floor's p20. A change counts when the spreads of the two
runs do not overlap; else it is called noise, however big the medians' difference looks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.model import Row
from bench.output import format_seconds, read_results
from bench.timing import quantile

MIN_REPS = 3
MEMORY_STEP_MIB = 8.0  # below this and below 5 percent, a peak has not changed


@dataclass(frozen=True)
class Spread:
    low: float
    median: float
    high: float

    def overlaps(self, other: Spread) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Change:
    """One provider of one case in both runs. ``ratio`` is after over before, below 1 is better."""

    case: str
    provider: str
    before: str
    after: str
    ratio: float | None
    spread: str
    verdict: str
    memory: str


def changes(before: list[Row], after: list[Row]) -> list[Change]:
    """Every row of either run, in the order of ``after``, then those that are gone."""
    old, new = _by_key(before), _by_key(after)
    keys = [*new, *(key for key in old if key not in new)]
    return [_change(key, old.get(key), new.get(key), old, new) for key in keys]


def _by_key(rows: list[Row]) -> dict[tuple[str, str], Row]:
    return {(f"{row.suite}: {row.case}", row.provider): row for row in rows}


def _change(
    key: tuple[str, str],
    old: Row | None,
    new: Row | None,
    before: dict[tuple[str, str], Row],
    after: dict[tuple[str, str], Row],
) -> Change:
    case, provider = key

    def change(ratio: float | None, spread: str, verdict: str, memory: str = "") -> Change:
        return Change(case, provider, _time(old), _time(new), ratio, spread, verdict, memory)

    if old is None or new is None:
        return change(None, "", "added" if old is None else "gone")
    if not old.median_s or not new.median_s:
        same = old.status == new.status
        return change(None, "", new.status if same else f"{old.status} -> {new.status}")
    old_floor, new_floor = _floor(old, case, before), _floor(new, case, after)
    # A floor is compared by its own time; and floors of different kinds cannot cancel a drift.
    by_floor = old_floor and new_floor and new.role != "floor" and old.floor == new.floor
    first = _relative(old, old_floor) if by_floor else _relative(old, None)
    second = _relative(new, new_floor) if by_floor else _relative(new, None)
    ratio = second.median / first.median
    spread = f"{second.low / first.high:.2f} .. {second.high / first.low:.2f}"
    if min(len(old.seconds), len(new.seconds)) < MIN_REPS:
        verdict = f"unclear: fewer than {MIN_REPS} repetitions"
    elif first.overlaps(second):
        verdict = "noise"
    else:
        verdict = f"{abs(1 - ratio):.0%} {'faster' if ratio < 1 else 'slower'}"
    return change(ratio, f"{spread}{' of floor' if by_floor else ''}", verdict, _memory(old, new))


def _floor(row: Row, case: str, rows: dict[tuple[str, str], Row]) -> Row | None:
    return rows.get((case, row.floor)) if row.floor else None


def _relative(row: Row, floor: Row | None) -> Spread:
    low, median, high = (quantile(row.seconds, fraction) for fraction in (0.2, 0.5, 0.8))
    if floor is None:
        return Spread(low, median, high)
    fast, usual, slow = (quantile(floor.seconds, fraction) for fraction in (0.2, 0.5, 0.8))
    return Spread(low / slow, median / usual, high / fast)


def _time(row: Row | None) -> str:
    return format_seconds(row.median_s) if row else "-"


def _memory(old: Row, new: Row) -> str:
    if old.peak_mib is None or new.peak_mib is None:
        return ""
    difference = new.peak_mib - old.peak_mib
    if abs(difference) < max(MEMORY_STEP_MIB, 0.05 * abs(old.peak_mib)):
        return "same"
    return f"{old.peak_mib:.0f} -> {new.peak_mib:.0f} MiB"


def environment_differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs in hardware, threads and versions, one line each."""
    lines = []
    old_cpu, new_cpu = dict(before["cpu"]), dict(after["cpu"])
    for cpu in (old_cpu, new_cpu):
        for volatile in ("mhz", "load_1min"):
            cpu.pop(volatile, None)
    for name, old, new in (
        ("cpu", old_cpu, new_cpu),
        ("gpu", before.get("gpu"), after.get("gpu")),
        ("threads", before["num_threads"], after["num_threads"]),
        ("python", before["python"], after["python"]),
        ("versions", before["versions"], after["versions"]),
    ):
        if isinstance(old, dict) and isinstance(new, dict):
            lines += [
                f"{key}: {old.get(key)} -> {new.get(key)}"
                for key in sorted({*old, *new})
                if old.get(key) != new.get(key)
            ]
        elif old != new:
            lines.append(f"{name}: {old} -> {new}")
    return lines


def main(before_path: Path, after_path: Path, console: Console) -> int:
    """Print the comparison of two result files."""
    before_environment, before = read_results(before_path)
    after_environment, after = read_results(after_path)
    for line in environment_differences(before_environment, after_environment):
        console.print(f"differs  {line}", style="yellow", highlight=False)
    table = Table(title="after / before (below 1 is faster)", title_justify="left")
    for name in ("case", "provider", "before", "after", "ratio", "spread", "verdict", "peak"):
        table.add_column(name)
    for change in changes(before, after):
        table.add_row(
            change.case,
            change.provider,
            change.before,
            change.after,
            f"{change.ratio:.2f}" if change.ratio else "-",
            change.spread,
            change.verdict,
            change.memory,
        )
    console.print(table)
    return 0
