"""Figures of a result file: a panel for each case, lines where a parameter was swept.

A bar says something by its length, so bars start at zero on a linear axis. Where times lie too far
apart for that, they are dots on a logarithmic one.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bench.model import Row
from bench.output import by_case, format_mib, format_rate, format_seconds, with_unit
from bench.timing import quantile

COLOURS = {"ours": "#d1495b", "peer": "#7d98b3", "floor": "#2e4057", "bound": "#9aa5b1"}
MISSING = {"color": "#888888", "fontsize": 8}
AMOUNTS = {"num_messages", "repeats"}  # how much a repetition does, not what
FAR_APART = 30
SWEEP_POINTS = 3


def time_unit(seconds: float) -> tuple[float, str]:
    """The unit, and its seconds, in which a time up to this is read best."""
    return next(((scale, unit) for scale, unit in ((1.0, "s"), (1e-3, "ms")) if seconds >= scale), (1e-6, "us"))


def png(figure: Figure) -> bytes:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return buffer.getvalue()


def panels(rows: Sequence[Row]) -> Figure:
    """For each case that has any the median times with their p20..p80 and, where measured, the
    peak memory."""
    every = list(by_case(rows).values())
    cases = [case for case in every if any(row.median_s for row in case)] or every
    heights = [0.9 + 0.3 * len(case) for case in cases]
    with_memory = any(row.peak_mib is not None for row in rows)
    figure, grid = plt.subplots(
        len(cases),
        2 if with_memory else 1,
        figsize=(11.0 if with_memory else 8.5, sum(heights) + 0.4),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axes, case in zip(grid, cases, strict=True):
        times(axes[0], case, case[0].case)
        if with_memory:
            memory(axes[1], case)
    return figure


def times(axes: Axes, rows: Sequence[Row], title: str) -> None:
    """Median times, p20..p80, and the fastest floor as a line."""
    floor = min((r.median_s for r in rows if r.role == "floor" and r.median_s), default=None)
    longest = max((row.p80_s or 0.0 for row in rows), default=0.0)
    shortest = min((row.median_s for row in rows if row.median_s), default=1.0)
    logarithmic = longest > FAR_APART * shortest
    scale, unit = time_unit(longest)
    if logarithmic:
        axes.set_xscale("log")
        axes.grid(axis="x", alpha=0.3)
        axes.xaxis.set_major_formatter(lambda value, _: format_seconds(value))
    else:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")
    for position, row in enumerate(rows):
        if row.median_s is None:
            axes.text(0.01, position, row.status, transform=axes.get_yaxis_transform(), va="center", **MISSING)
            continue
        low, high = quantile(row.seconds, 0.2), quantile(row.seconds, 0.8)
        spread = [[row.median_s - low], [high - row.median_s]]
        if logarithmic:
            axes.errorbar(row.median_s, position, xerr=spread, fmt="o", color=COLOURS[row.role], ecolor="#333333")
        else:
            axes.barh(position, row.median_s, xerr=spread, color=COLOURS[row.role], ecolor="#333333")
        text = format_seconds(row.median_s)
        if row.unit in ("byte", "token"):
            text += f" ({format_rate(row)})"
        elif row.floor_percent is not None and row.role != "floor":
            text += f" ({row.floor_percent:.0f}% of floor)"
        label(axes, high, position, text)
    if floor is not None:
        axes.axvline(floor, color=COLOURS["floor"], linestyle="--", linewidth=1)
    words = "median time (logarithmic)" if logarithmic else f"median time, {unit}"
    axes.set_xlabel(words if floor is None else f"{words}; dashed: the floor", fontsize=8)
    finish(axes, rows, title=title, reach=1.45)


def memory(axes: Axes, rows: Sequence[Row], title: str = "") -> None:
    """Peak memory, row by row beside the times, whose labels it shares; that of a floor says nothing."""
    measured = [row.peak_mib is not None and row.role in ("ours", "peer") for row in rows]
    axes.set_visible(any(measured))
    for position, row in enumerate(rows):
        if row.peak_mib is None or not measured[position]:
            continue
        axes.barh(position, max(row.peak_mib, 0.0), color=COLOURS[row.role])
        label(axes, max(row.peak_mib, 0.0), position, f"{format_mib(row.peak_mib)} MiB")
    axes.set_xlabel("peak memory, MiB", fontsize=8)
    finish(axes, rows, title=title, reach=1.25)
    axes.set_yticklabels([])
    axes.tick_params(axis="y", length=0)


def label(axes: Axes, x: float, position: int, text: str) -> None:
    """Beside the end of a bar, and before the line of a floor that may pass there."""
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.annotate(
        text, (x, position), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8, bbox=box, zorder=3
    )


def finish(axes: Axes, rows: Sequence[Row], *, title: str, reach: float) -> None:
    axes.set_yticks(range(len(rows)), [row.provider for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_xlim()
    if axes.get_xscale() == "log":
        axes.set_xlim(low, high * (high / low) ** (0.7 * (reach - 1)))
    else:
        axes.set_xlim(low, high * reach)


def sweeps(rows: Sequence[Row]) -> list[tuple[str, Figure]]:
    """A figure for every number that varies while all other params stay, with its name."""
    figures = []
    for name, group in _sweeps(rows):
        ours_and_peers = [row for row in group if row.role in ("ours", "peer")]
        measures = [("rate" if group[0].unit in ("byte", "token") else "median_s", group)]
        if any(row.peak_mib is not None for row in ours_and_peers):
            measures.append(("peak_mib", ours_and_peers))
        if any(row.floor_percent is not None for row in ours_and_peers):
            measures.append(("floor_percent", ours_and_peers))
        count = len(measures)
        figure, grid = plt.subplots(1, count, figsize=(5.2 * count, 3.6), squeeze=False, layout="constrained")
        for axes, (measure, shown) in zip(grid[0], measures, strict=True):
            draw_lines(axes, shown, name, measure)
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
        figure.suptitle(_constants(group, name), fontsize=9)
        figures.append((name, figure))
    return figures


def _sweeps(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    rows = [row for row in rows if row.median_s is not None]
    names = {name for row in rows for name, value in row.params.items() if _is_number(value)} - AMOUNTS
    found = []
    for name in sorted(names):
        groups: dict[str, list[Row]] = {}
        for row in rows:
            others = sorted((k, v) for k, v in row.params.items() if k != name and k not in AMOUNTS)
            groups.setdefault(f"{row.suite} {others}", []).append(row)
        for group in groups.values():
            points: dict[str, set[Any]] = {}
            for row in group:
                points.setdefault(row.provider, set()).add(row.params.get(name))
            # A provider measured here and there is no line.
            lines = [row for row in group if len(points[row.provider]) >= SWEEP_POINTS]
            if lines:
                found.append((name, lines))
    return found


def _constants(rows: Sequence[Row], name: str) -> str:
    """What the sweep holds, in the params' names."""
    held = {k: v for k, v in rows[0].params.items() if k not in {name, "device", "backend"} | AMOUNTS}
    return f"{rows[0].suite}: " + ", ".join(f"{key} {value}" for key, value in held.items())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _size(num_bytes: int) -> str:
    return f"{num_bytes // 2**20} MiB" if num_bytes >= 2**20 else f"{num_bytes // 2**10} KiB"


def _in_words(value: float, measure: str, unit: str) -> str:
    if measure == "rate":
        return with_unit(value, unit)
    return format_seconds(value) if measure == "median_s" else f"{value:g}"


def _line_colours(rows: Sequence[Row]) -> dict[str, str]:
    """Ours and the floors have one everywhere; peers take theirs in order, the same in every panel."""
    palette = iter(("#3b7a9e", "#e0a030", "#5a9367", "#8f6bb1", "#c07f5a", "#4fb0ae", "#8a8a8a"))
    found = {}
    for row in rows:
        if row.provider not in found:
            found[row.provider] = COLOURS[row.role] if row.role != "peer" else next(palette, COLOURS["peer"])
    return found


def draw_lines(axes: Axes, rows: Sequence[Row], name: str, measure: str) -> None:
    colours = _line_colours(rows)
    for provider in dict.fromkeys(row.provider for row in rows):
        line = [r for r in rows if r.provider == provider and getattr(r, measure) is not None]
        if not line:
            continue
        line.sort(key=lambda row: row.params[name])
        ours = line[0].role == "ours"
        axes.plot(
            [row.params[name] for row in line],
            [getattr(row, measure) for row in line],
            marker="o",
            markersize=3,
            linewidth=2.2 if ours else 1.2,
            linestyle="--" if line[0].role in ("floor", "bound") else "-",
            color=colours[provider],
            label=provider,
            zorder=3 if ours else 2,
        )
    axes.set_xscale("log", base=2)
    points = sorted({row.params[name] for row in rows})
    axes.set_xticks(points, [_size(point) if name.endswith("bytes") else f"{point:,}" for point in points], fontsize=8)
    axes.tick_params(axis="x", rotation=30)
    axes.xaxis.minorticks_off()
    axes.tick_params(axis="y", labelsize=8)
    if measure == "floor_percent":
        axes.axhline(100, color=COLOURS["floor"], linestyle="--", linewidth=1)
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: _in_words(value, measure, rows[0].unit))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(name.replace("_", " "), fontsize=8)
    axes.set_title(
        {
            "rate": "rate",
            "median_s": "median time",
            "peak_mib": "peak memory, MiB",
            "floor_percent": "percent of the floor",
        }[measure],
        fontsize=9,
        loc="left",
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
