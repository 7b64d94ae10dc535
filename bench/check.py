"""``bench check``: has something become slower? Ratios of quick cases against stored ones.

Times differ from machine to machine and from hour to hour; the ratio of two providers of one run
much less. So for each case of ours the ratio to its floor is kept, for CPUs that multiply bf16 and
for those that emulate it apart, and what is found now is held against it: worse than the factor that
the file states is a failure, less than that is told and no more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cases import loss, ring, student, teacher
from bench.environment import has_native_bf16
from bench.model import Case, Row
from bench.timing import quantile

STORED = Path(__file__).with_name("check.json")
DEFAULT_FACTOR = 2.0  # of a ratio that is new in the file
# The first two thirds of a factor of two: told, as something to look at.
NOTICEABLE = 1.25


@dataclass(frozen=True)
class Finding:
    """One ratio, time over the floor's: ``verdict`` is ok, better, worse, failed, new or missing."""

    case: str
    stored: float | None
    found: float | None
    low: float | None
    high: float | None
    factor: float
    verdict: str


def cases(device: str = "cpu") -> list[Case]:
    """The quick cases that have a floor, ours and the floor alone."""
    suites: Iterable[Case] = (
        *loss.cases(device=device, quick=True),
        *ring.cases(device=device, quick=True),
        *teacher.cases(device=device, quick=True),
        *student.cases(device=device, quick=True),
    )
    found = []
    for case in suites:
        kept = tuple(p for p in case.providers if p.role in ("ours", "floor"))
        if {p.role for p in kept} == {"ours", "floor"}:
            found.append(replace(case, providers=kept, measures_memory=False))
    return found


def kind_of_cpu() -> str:
    return "with native bf16" if has_native_bf16() else "without native bf16"


def ratios(rows: Sequence[Row]) -> dict[str, tuple[float, float, float]]:
    """Low, median and high of our time over the floor's, repetition by repetition."""
    found = {}
    for row in rows:
        floor = next(
            (r for r in rows if (r.suite, r.case, r.provider) == (row.suite, row.case, row.floor) and r.median_s), None
        )
        if row.role != "ours" or not row.median_s or floor is None:
            continue
        # Repetition i of both ran in the same round.
        pairs = [a / b for a, b in zip(row.seconds, floor.seconds, strict=False)]
        found[f"{row.suite}: {row.case}: {row.provider}"] = tuple(quantile(pairs, q) for q in (0.2, 0.5, 0.8))
    return found


def judge(rows: Sequence[Row], stored: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """Every ratio that is stored or was found. A failure must be one even at its best repetitions."""
    measured = ratios(rows)
    findings = []
    for case in [*stored, *(name for name in measured if name not in stored)]:
        low, median, high = measured.get(case, (None, None, None))
        before = stored[case]["ratio"] if case in stored else None
        factor = stored[case]["fails_at"] if case in stored else DEFAULT_FACTOR
        if before is None:
            verdict = "new"
        elif median is None or low is None or high is None:
            verdict = "missing"
        elif low > before * factor:
            verdict = "failed"
        elif low > before * NOTICEABLE:
            verdict = "worse"
        elif high < before / NOTICEABLE:
            verdict = "better"
        else:
            verdict = "ok"
        findings.append(Finding(case, before, median, low, high, factor, verdict))
    return findings


def read_stored(path: Path = STORED) -> dict[str, dict[str, dict[str, float]]]:
    return json.loads(path.read_text()) if path.exists() else {}


def store(rows: Sequence[Row], path: Path = STORED) -> None:
    """Keep what was found for this kind of CPU, with the factors that are there."""
    kept = read_stored(path)
    before = kept.get(kind_of_cpu(), {})
    kept[kind_of_cpu()] = {
        case: {"ratio": round(median, 3), "fails_at": before.get(case, {}).get("fails_at", DEFAULT_FACTOR)}
        for case, (_, median, _) in ratios(rows).items()
    }
    path.write_text(json.dumps(kept, indent=2) + "\n")


def conclude(rows: Sequence[Row], console: Console, *, update: bool, path: Path = STORED) -> int:
    """Print the findings; 1 where one failed or could not be measured."""
    if update:
        store(rows, path)
        console.print(f"stored the ratios of CPUs {kind_of_cpu()} in {path.name}", highlight=False)
        return 0
    stored = read_stored(path).get(kind_of_cpu(), {})
    if not stored:
        console.print(f"{path.name} has no ratios of CPUs {kind_of_cpu()}; --update stores those of this run")
    findings = judge(rows, stored)
    table = Table(title=f"time over the floor's, CPUs {kind_of_cpu()}", title_justify="left")
    for name in ("case", "stored", "now", "p20 .. p80", "fails at", "verdict"):
        table.add_column(name)
    for f in findings:
        spread = "-" if f.low is None else f"{f.low:.2f} .. {f.high:.2f}"
        limit = "-" if f.stored is None else f"{f.stored * f.factor:.2f}"
        style = {"failed": "bold red", "missing": "bold red", "worse": "yellow", "better": "green"}.get(f.verdict, "")
        table.add_row(f.case, _ratio(f.stored), _ratio(f.found), spread, limit, f.verdict, style=style)
    console.print(table)
    bad = [f.case for f in findings if f.verdict in ("failed", "missing")]
    if bad:
        console.print(f"failed: {'; '.join(bad)}", style="red", highlight=False)
    return 1 if bad else 0


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
