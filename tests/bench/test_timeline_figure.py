"""The timeline on a result's page."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli
from bench.environment import environment
from bench.model import Row
from bench.output import write_results
from bench.plots import _sweeps, png, sweeps
from bench.timeline import _window, draw, read_tracks
from kdflow.tracing.timeline import Span, write_timeline


def spans() -> list[Span]:
    found = []
    for step in range(12):
        begin = step * 100
        found += [
            Span("teacher", 0, "host", "prefill", begin * 10**6, (begin + 60) * 10**6, {"rank": 0, "ticket": step}),
            Span("student", 0, "host", "step", begin * 10**6, (begin + 100) * 10**6, {"step": step + 1}),
            Span("student", 0, "host", "forward", begin * 10**6, (begin + 40) * 10**6, {}),
            Span("ring", 0, f"slot {step % 2}", "full", (begin + 60) * 10**6, (begin + 90) * 10**6, {"ticket": step}),
        ]
    return found


def test_tracks_and_the_steps_in_the_middle(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_timeline(path, spans())
    tracks = read_tracks(path)
    assert list(tracks) == ["teacher 0, host", "ring 0, slot 0", "ring 0, slot 1", "student 0, host"]
    begin, end, edges = _window(tracks)
    assert (begin, end) == pytest.approx((0.5, 0.8))
    assert edges == pytest.approx([0.6, 0.7])
    figure = draw(tracks)
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert labels == {"prefill", "full", "forward"}


def test_a_short_run_is_shown_whole(tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    write_timeline(path, [span for span in spans() if span.start_ns < 400 * 10**6])
    begin, end, edges = _window(read_tracks(path))
    assert (begin, end) == pytest.approx((0.0, 0.4))
    assert edges == pytest.approx([0.1, 0.2, 0.3])


def test_a_page_with_a_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, timeline = tmp_path / "a.jsonl", tmp_path / "elsewhere.json"
    row = Row("s", "c", {}, "p", "ours", "ok", seconds=(1.0, 1.1), median_s=1.05, p20_s=1.0, p80_s=1.1)
    write_results(results, environment(device="cpu", num_threads=1), [row])
    write_timeline(timeline, spans())
    assert cli.main(["report", str(results), "--timeline", str(timeline)]) == 0
    assert "<h2>timeline</h2>" in (tmp_path / "a.html").read_text()
    assert (tmp_path / "a-timeline.png").stat().st_size > 5_000
    assert json.loads((tmp_path / "a.timeline.json").read_text()) == json.loads(timeline.read_text())
    assert cli.main(["report", str(results), "--timeline", str(results)]) == 2
    assert "expected a run's timeline.json" in capsys.readouterr().err


def test_three_points_are_a_sweep_with_three_panels() -> None:
    def row(num_rows: int, provider: str, role: str) -> Row:
        params = {"num_rows": num_rows, "vocab_size": 96, "device": "cpu"}
        percent = 100.0 if role == "floor" else 80.0
        return Row(
            "loss",
            f"N={num_rows}",
            params,
            provider,
            role,  # type: ignore[arg-type]
            "ok",
            seconds=(1.0,),
            median_s=num_rows / 10,
            peak_mib=None if role == "floor" else 5.0,
            floor_percent=percent,
        )

    rows = [row(n, *who) for n in (8, 16, 32) for who in (("floor", "floor"), ("kdflow", "ours"), ("eager", "peer"))]
    assert [name for name, _ in _sweeps(rows)] == ["num_rows"]
    here_and_there = replace(rows[-1], provider="trl")
    assert {row.provider for _, group in _sweeps([*rows, here_and_there]) for row in group} == {
        "floor",
        "kdflow",
        "eager",
    }
    cut = [replace(row, median_s=None) if row.params["num_rows"] == 16 else row for row in rows]
    assert _sweeps(cut) == []  # two points are left
    ((name, figure),) = sweeps(rows)
    assert name == "num_rows"
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["median time", "peak memory, MiB", "percent of the floor"]
    assert figure.axes[2].get_ylim()[0] == 0  # a share is shown from nothing on
    # Everybody else has failed.
    ((_, figure),) = sweeps([replace(row, peak_mib=1.0) for row in rows if row.role == "floor"])
    png(figure)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["median time"]
