"""What ``bench gpu`` prints last, short enough to be read in the tail of a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.gpu.parts import Result
from bench.gpu.verdict import Finding, deviation
from bench.model import Row
from bench.output import by_case, format_mib, format_percent, format_rate, format_seconds

STYLES = {"pass": "green", "fail": "red", "not measured": "yellow", "reported": ""}


def print_all(
    results: Mapping[str, Result],
    rows: Sequence[Row],
    findings: Sequence[Finding],
    console: Console,
    *,
    rehearsal: bool,
) -> None:
    for name, case in by_case(rows).items():
        console.print(f"{name}", style="bold", highlight=False, markup=False)
        for row in case:
            console.print(f"  {_line(row, case)}", highlight=False, markup=False, soft_wrap=True)
    for package, state in results["versions"].found.get("packages", {}).items() if "versions" in results else ():
        console.print(f"{package}: {state}", highlight=False, markup=False, soft_wrap=True)
    if "tests" in results:
        _print_tests(results["tests"], console)
    table = Table(title="parts", title_justify="left")
    for column in ("part", "status", "note"):
        table.add_column(column)
    for name, result in results.items():
        table.add_row(name, result.status, escape(result.note))
    console.print(table)
    table = Table(
        title="verdict of a rehearsal: its times mean nothing" if rehearsal else "verdict", title_justify="left"
    )
    for column in ("goal", "wanted", "measured", "verdict", "where"):
        table.add_column(column, justify="right" if column in ("wanted", "measured") else "left")
    for finding in findings:
        measured = "-" if finding.measured is None else f"{finding.measured:.4g}"
        cells = (finding.goal, finding.wanted, measured, finding.verdict, finding.note)
        table.add_row(*map(escape, cells), style=STYLES[finding.verdict])
    console.print(table)


def _line(row: Row, case: Sequence[Row]) -> str:
    if row.median_s is None:
        return f"{row.provider}: {row.status}: {row.note[:120]}"
    words = [format_seconds(row.median_s)]
    if row.work:
        words.append(format_rate(row))
    if row.floor_percent is not None and row.role != "floor":
        words.append(f"{format_percent(row.floor_percent)} of floor")
    if row.peak_mib is not None and row.role != "floor":
        words.append(f"{format_mib(row.peak_mib)} MiB")
    if (off := deviation(row, case)) is not None:
        words.append(f"{off:.2g}% off the others")
    words += [f"{name} {value:.4g}" for name, value in row.metrics.items()]
    note = f" ({row.note[:200]})" if row.note else ""
    return f"{row.provider}: {', '.join(words)}{note}"


def _print_tests(result: Result, console: Console) -> None:
    for file, found in result.found.get("tests", {}).items():
        counts = ", ".join(f"{found[name]} {name}" for name in ("passed", "failed", "skipped"))
        console.print(f"{file}: {counts} {found['note']}", highlight=False, markup=False)
        for failure in found["failures"][:30]:
            console.print(f"  FAILED {failure}", highlight=False, markup=False, soft_wrap=True)
