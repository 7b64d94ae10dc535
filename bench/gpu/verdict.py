"""The goals of ``goals.json`` against measured rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from bench.model import Row
from bench.timing import quantile

GOALS = Path(__file__).with_name("goals.json")


@dataclass(frozen=True)
class Finding:
    """One goal and what was measured; ``verdict`` is pass, fail, reported or not measured."""

    goal: str
    wanted: str
    measured: float | None
    verdict: str
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(rows: Sequence[Row], names: Mapping[str, str]) -> list[Finding]:
    """Every goal with its worst row; ``names`` stands for the braces in the goals' cases."""
    return [_judge(goal, rows, names) for goal in json.loads(GOALS.read_text())]


def _judge(goal: Mapping[str, Any], rows: Sequence[Row], names: Mapping[str, str]) -> Finding:
    pattern = goal["case"].format_map(names)
    candidates = [row for row in rows if row.suite == goal["suite"] and fnmatchcase(row.case, pattern)]
    at_least, at_most = goal.get("at_least"), goal.get("at_most")
    wanted = f">= {at_least:g}" if at_least is not None else f"<= {at_most:g}" if at_most is not None else "-"
    asked = [row for row in candidates if row.role == "ours" and fnmatchcase(row.provider, goal.get("provider", "*"))]
    found: list[tuple[float, Row]] = []
    for row in asked:
        value = _measure(goal, row, [r for r in candidates if r.case == row.case])
        if value is not None:
            found.append((value, row))
    if not found:
        return Finding(goal["goal"], wanted, None, "not measured", _why_not(goal, candidates, asked))
    worst = max if at_most is not None else min
    value, row = worst(found, key=lambda pair: pair[0])
    passed = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    verdict = "reported" if wanted == "-" else "pass" if passed else "fail"
    lost = [r for r in asked if r.status != "ok"]
    note = "; ".join([f"{row.provider}: {row.case}", *(f"without {r.case}: {r.provider}: {r.status}" for r in lost)])
    return Finding(goal["goal"], wanted, value, verdict, note)


def _measure(goal: Mapping[str, Any], row: Row, case: Sequence[Row]) -> float | None:
    measure = goal["measure"]
    if measure in ("speedup", "time_over"):
        other = next((r for r in case if r.provider == goal["over"]), None)
        if other is None:
            return None
        return _time_ratio(other, row) if measure == "speedup" else _paired_ratio(row, other)
    if measure == "deviation":
        return deviation(row, case)
    if measure in ("floor_percent", "peak_mib", "rate"):
        return getattr(row, measure)
    return row.metrics.get(measure)


def _time_ratio(above: Row, below: Row) -> float | None:
    """Their times' ratio; through the floors where both have one of the same kind, which cancels
    what the clocks did between two groups."""
    if above.floor_percent and below.floor_percent and above.floor == below.floor:
        return below.floor_percent / above.floor_percent
    return above.median_s / below.median_s if above.median_s and below.median_s else None


def _paired_ratio(above: Row, below: Row) -> float | None:
    """The median over rounds, in each of which both did one repetition: what the clocks do in between cancels."""
    ratios = [a / b for a, b in zip(above.seconds, below.seconds, strict=False)]
    return quantile(ratios, 0.5) if ratios else None


def deviation(row: Row, case: Iterable[Row]) -> float | None:
    """How far a row's check values are at most from the median of the other providers', in percent."""
    others = [r.check for r in case if r.provider != row.provider and r.check]
    found = []
    for name, value in row.check.items():
        values = [check[name] for check in others if name in check]
        if values and (usual := quantile(values, 0.5)):
            found.append(100 * abs(value - usual) / abs(usual))
    return max(found, default=None)


def _why_not(goal: Mapping[str, Any], candidates: Sequence[Row], asked: Sequence[Row]) -> str:
    if not candidates:
        return "no such case in this run"
    if not asked:
        return f"no row of {goal.get('provider', 'ours')}"
    involved = [*asked, *(r for r in candidates if r.provider == goal.get("over"))]
    notes = [f"{row.provider}: {row.status}: {row.note}" for row in involved if row.status != "ok"]
    return notes[0][:160] if notes else "no row has this measure"
