"""A run's timeline (kdflow/tracing) as a figure: a row for each track, a colour for each phase."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Spans that hold others are not drawn but for the step, whose ends are lines.
HOLDERS = {"microbatch", "step"}
COLOURS = {
    "wait for slot": "#d9dee5",
    "prefill": "#3b7a9e",
    "gather": "#5c93b3",
    "publish": "#7fb3cf",
    "rollout": "#8f6bb1",
    "filling": "#a8c8da",
    "full": "#5a9367",
    "being read": "#f2d49b",
    "request": "#e8d9b8",
    "forward": "#e0a030",
    "receive wait": "#e02020",
    "loss": "#b0527f",
    "backward": "#c07f5a",
    "optimizer step": "#6d4c8f",
    "metrics": "#b9a4cc",
    "release": "#cfcfcf",
    "save": "#8a8a8a",
    "eval": "#e9e4d4",
}
SHOWN_STEPS = 3
SHORT_RUN = 8  # steps: shown whole, since a teacher that is ahead may be done before its middle


@dataclass(frozen=True)
class Bar:
    name: str
    start_s: float
    seconds: float


def read_tracks(path: Path) -> dict[str, list[Bar]]:
    """The bars of each track, named by process and track.

    Raises:
        ValueError: the file is no timeline of a run.
    """
    try:
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
        names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in events if e["ph"] == "M"}
        tracks: dict[tuple[int, int], list[Bar]] = {}
        for event in events:
            if event["ph"] == "X":
                bar = Bar(event["name"], event["ts"] / 1e6, event["dur"] / 1e6)
                tracks.setdefault((event["pid"], event["tid"]), []).append(bar)
        return {
            f"{names['process_name', pid, 0]['name']}, {names['thread_name', pid, tid]['name']}": bars
            for (pid, tid), bars in sorted(tracks.items())
        }
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path}: expected a run's timeline.json, which `kdflow train --profile.timeline=true` writes into profile/"
        ) from None


def draw(tracks: dict[str, list[Bar]]) -> Figure:
    """Steps from the middle of the run; all of it where there are few or none."""
    begin, end, steps = _window(tracks)
    height = 1.4 + 0.32 * len(tracks)
    figure, axes = plt.subplots(figsize=(11.0, height), layout="constrained")
    seen: dict[str, None] = {}
    for position, bars in enumerate(tracks.values()):
        shown = [b for b in bars if b.name not in HOLDERS and b.start_s < end and b.start_s + b.seconds > begin]
        for bar in sorted(shown, key=lambda b: -b.seconds):  # what lies inside another one comes on top
            axes.broken_barh(
                [(bar.start_s - begin, bar.seconds)], (position - 0.38, 0.76), color=COLOURS.get(bar.name, "#444444")
            )
            seen[bar.name] = None
    for edge in steps:
        axes.axvline(edge - begin, color="#333333", linewidth=0.8, linestyle=":")
    axes.set_xlim(0, end - begin)
    axes.set_ylim(len(tracks) - 0.5, -0.5)
    axes.set_yticks(range(len(tracks)), list(tracks), fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("s; dotted lines are ends of steps", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    order = [name for name in COLOURS if name in seen] + [name for name in seen if name not in COLOURS]
    patches = [Patch(color=COLOURS.get(name, "#444444"), label=name) for name in order]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, fontsize=8, frameon=False)
    return figure


def _window(tracks: dict[str, list[Bar]]) -> tuple[float, float, list[float]]:
    """Begin and end of what is shown, and the ends of the steps in it."""
    steps = sorted((b for bars in tracks.values() for b in bars if b.name == "step"), key=lambda b: b.start_s)
    if not steps:
        every = [bar for bars in tracks.values() for bar in bars]
        return min(b.start_s for b in every), max(b.start_s + b.seconds for b in every), []
    starts = sorted({step.start_s for step in steps})
    # Neither the first, which warms up, nor the last, for which teachers have nothing left to do.
    first = max(0, (len(starts) - SHOWN_STEPS + 1) // 2)
    middle = starts if len(starts) <= SHORT_RUN else starts[first : first + SHOWN_STEPS]
    shown = [s for s in steps if s.start_s in middle]
    ends = sorted({s.start_s + s.seconds for s in shown})
    return shown[0].start_s, ends[-1], ends[:-1]
