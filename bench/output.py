"""Results on the terminal and as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.model import Row

RESULTS = Path(__file__).parent / "results"
PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
UNIT_NAMES = {"flop": "FLOP/s", "byte": "B/s", "token": "tok/s", "message": "msg/s", "logit": "logits/s"}
STYLES = {"ours": "bold", "floor": "dim", "bound": "dim", "peer": ""}


def format_seconds(seconds: float | None) -> str:
    """Three significant digits with the unit that fits."""
    if seconds is None:
        return "-"
    if seconds == 0:
        return "0 s"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def format_rate(row: Row) -> str:
    return "-" if row.rate is None or not row.work else with_unit(row.rate, row.unit)


def with_unit(rate: float, unit: str) -> str:
    for scale, prefix in PREFIXES:
        if rate >= scale and unit != "token":
            return f"{rate / scale:.3g} {prefix}{UNIT_NAMES[unit]}"
    return f"{rate:.0f} {UNIT_NAMES[unit]}"


def format_spread(row: Row) -> str:
    return f"{format_seconds(row.p20_s)} .. {format_seconds(row.p80_s)}" if row.median_s else "-"


def format_mib(mib: float | None) -> str:
    return "-" if mib is None else f"{mib:.1f}" if abs(mib) < 9.95 else f"{mib:.0f}"


def format_percent(percent: float | None) -> str:
    return "-" if percent is None else f"{percent:.1f}%" if percent < 9.95 else f"{percent:.0f}%"


def format_value(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def remarks(row: Row) -> str:
    """The note, and the status where it is not plain success."""
    status = "" if row.status == "ok" else row.status
    measures = {**row.metrics, **{k: v for k, v in row.check.items() if k.startswith("error_")}}
    if "error_dW" in measures:
        measures["loss"] = row.check["loss"]
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
    return ": ".join(part for part in (status, row.note) if part) + (f" [{metrics}]" if metrics else "")


COLUMNS = (
    ("provider", lambda row: row.provider),
    ("median", lambda row: format_seconds(row.median_s)),
    ("p20 .. p80", format_spread),
    ("reps", lambda row: str(len(row.seconds))),
    ("rate", format_rate),
    ("of floor", lambda row: format_percent(row.floor_percent)),
    ("peak MiB", lambda row: format_mib(row.peak_mib)),
    ("note", remarks),
)
"""Name and text of each column, for the terminal, Markdown and HTML alike."""


def print_case(rows: Iterable[Row], console: Console) -> None:
    rows = list(rows)
    table = Table(title=f"{rows[0].suite}: {rows[0].case}", title_justify="left")
    for index, (name, _) in enumerate(COLUMNS):
        table.add_column(name, justify="left" if index in (0, len(COLUMNS) - 1) else "right")
    for row in rows:
        # Escaped, since the brackets of a note are not markup.
        table.add_row(*(escape(text(row)) for _, text in COLUMNS), style=STYLES[row.role])
    console.print(table)


def markdown_table(rows: Iterable[Row]) -> str:
    """The same table for a document."""
    lines = [
        "| " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for row in rows:
        cells = [text(row) for _, text in COLUMNS]
        if row.role == "ours":
            cells[0] = f"**{cells[0]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def markdown(environment: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """A whole result file for a document: where it was measured, then a table for each case."""
    cpu, git = environment["cpu"], environment["git"] or {}
    where = (
        f"{cpu['model']} ({cpu['cores']} cores; {', '.join(cpu['isa'])}), {environment['num_threads']} threads, "
        f"torch {environment['versions'].get('torch')}, {environment['time'][:10]}, "
        f"revision {git.get('revision')}{' with changes' if git.get('dirty') else ''}, load {cpu['load_1min']} before"
    )
    if gpu := environment["gpu"]:
        where = f"{gpu['name']}; {where}"
    cases = by_case(rows)
    measured = {name: case for name, case in cases.items() if any(row.median_s for row in case)}
    tables = [f"**{name}**\n\n{markdown_table(case)}" for name, case in measured.items()]
    if missing := [f"{name} ({remarks(case[0])})" for name, case in cases.items() if name not in measured]:
        tables.append("Not measured:\n" + "\n".join(f"- {text}" for text in missing))
    if goals := environment.get("verdict"):
        lines = ["| " + " | ".join(goals[0]) + " |", "|" + " --- |" * len(goals[0])]
        lines += ["| " + " | ".join(map(format_value, goal.values())) + " |" for goal in goals]
        tables.insert(0, "\n".join(lines))
    return "\n\n".join([where, *tables])


def write_results(path: Path, environment: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """One JSON object a line: the environment first, then the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [dict(environment), *(row.as_json() for row in rows)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_results(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """What ``write_results`` wrote; raises ValueError where the file is something else."""
    records = []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise ValueError(
            f"{path}: expected a file that `python -m bench` wrote; it cannot be read ({reason})"
        ) from None
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: expected a JSON object a line as in bench/results/*.jsonl,"
                f" got {line[:40]!r} ({error.msg})"
            ) from None
    if not records or not isinstance(records[0], dict) or records[0].get("kind") != "environment":
        raise ValueError(f"{path}: expected a file that `python -m bench` wrote, whose first line is the environment")
    return records[0], [Row.from_json(record) for record in records[1:]]


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by suite and case, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.suite}: {row.case}", []).append(row)
    return groups
