"""A result file as one HTML page without outside references, and its figures as PNG files."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import plots
from bench.model import Row
from bench.output import COLUMNS, by_case, format_value
from bench.timeline import draw, read_tracks

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; max-width: 72rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #e3e7ec;
  vertical-align: top; }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }
td { white-space: nowrap; } td:last-child { white-space: normal; color: #5b6675; overflow-wrap: anywhere; }
tr.ours { background: #fdf1f2; font-weight: 600; } tr.floor, tr.bound { color: #66717f; }
img { max-width: 100%; } dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; }
dt { color: #66717f; } dd { margin: 0; }
"""


def write_report(path: Path, environment: Mapping[str, Any], rows: Sequence[Row]) -> Path:
    """Write the page beside the result file, and its figures as PNG files, too."""
    sections = []
    suites = list(dict.fromkeys(row.suite for row in rows))
    for suite in suites:
        of_suite = [row for row in rows if row.suite == suite]
        stem = path.stem if len(suites) == 1 else f"{path.stem}-{suite}"
        drawn = [(stem, plots.panels(of_suite))]
        drawn += [(f"{stem}-{name}", figure) for name, figure in plots.sweeps(of_suite)]
        images = []
        for name, figure in drawn:
            image = plots.png(figure)
            path.with_name(f"{name}.png").write_bytes(image)
            images.append(_image(name, image))
        tables = "".join(f"<h3>{html.escape(name)}</h3>{_table(case)}" for name, case in by_case(of_suite).items())
        sections.append(f"<h2>{html.escape(suite)}</h2>{''.join(images)}{tables}")
    if (timeline := path.with_suffix(".timeline.json")).is_file():
        image = plots.png(draw(read_tracks(timeline)))
        path.with_name(f"{path.stem}-timeline.png").write_bytes(image)
        note = f"The whole of it is in {timeline.name}, for ui.perfetto.dev."
        sections.append(f"<h2>timeline</h2>{_image('timeline', image)}<p>{html.escape(note)}</p>")
    page = path.with_suffix(".html")
    page.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>kdflow benchmarks</title>'
        f"<style>{STYLE}</style><h1>kdflow benchmarks</h1>{_environment(environment)}"
        f"{_records('Verdict', environment.get('verdict', []))}{_records('Parts', _parts(environment))}"
        f"{''.join(sections)}</html>\n"
    )
    return page


def _image(name: str, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    return f'<p><img alt="{html.escape(name)}" src="data:image/png;base64,{data}"></p>'


def _table(rows: Iterable[Row]) -> str:
    head = "".join(f"<th>{name}</th>" for name, _ in COLUMNS)
    body = "".join(
        f'<tr class="{row.role}">' + "".join(f"<td>{html.escape(text(row))}</td>" for _, text in COLUMNS) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _records(title: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Records with the same keys as a table, where there are any."""
    if not records:
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in records[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(format_value(value))}</td>" for value in record.values()) + "</tr>"
        for record in records
    )
    return f"<h2>{html.escape(title)}</h2><table><tr>{head}</tr>{body}</table>"


def _parts(environment: Mapping[str, Any]) -> list[dict[str, str]]:
    """Of `bench gpu`: how each part ended, and what it found besides rows."""
    found = []
    for name, part in environment.get("parts", {}).items():
        details = [f"{package} {state}" for package, state in part.get("packages", {}).items()]
        for folder, counts in part.get("tests", {}).items():
            numbers = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
            details += [f"{folder}: {numbers} {counts['note']}".strip(), *counts["failures"]]
        found.append({"part": name, "status": part["status"], "note": part["note"], "found": "; ".join(details)})
    return found


def _environment(environment: Mapping[str, Any]) -> str:
    items = []
    for name, value in environment.items():
        if name in ("kind", "verdict", "parts") or value is None:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(
                f"{key} {json.dumps(part) if isinstance(part, list) else part}" for key, part in value.items()
            )
        items.append(f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>")
    return f"<dl>{''.join(items)}</dl>"
