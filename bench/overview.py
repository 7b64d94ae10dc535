"""``bench overview``: the README's figure and table, from the stored result files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from bench import output, plots
from bench.model import Row
from bench.output import RESULTS, format_mib, format_percent, format_seconds

LOSS_CASES = (
    ("one H100", "gpu-h100-loss.jsonl", "forward_kl bf16 N=8192 V=151936 Hs=2560 Ht=2048"),
    ("two CPU cores", "loss-cpu.jsonl", "forward_kl bf16 N=1024 V=151936 Hs=896 Ht=2048"),
)
RING = "ring-cpu.jsonl"
E2E = "e2e-amx.jsonl"


def main(folder: Path, console: Console) -> int:
    """Write the figure and print the table."""
    path = folder / "overview.png"
    path.write_bytes(plots.png(draw(folder)))
    console.print(f"wrote {path.name}", highlight=False)
    print(table(folder))
    return 0


def draw(folder: Path = RESULTS) -> Figure:
    """Loss on a GPU and on a CPU, time and memory; the ring beside a copy; tokens/s end to end."""
    figure, grid = plt.subplots(3, 2, figsize=(11.0, 9.4), height_ratios=[8, 7, 7.5], layout="constrained")
    for axes, (where, file, case) in zip(grid, LOSS_CASES, strict=False):
        rows = _case(folder / file, case)
        plots.times(axes[0], rows, f"Loss and gradients on {where}: {_shape(rows[0])}")
        plots.memory(axes[1], rows, "Peak memory above inputs and gradients")
    _shares(grid[2][0], _rows(folder / RING))
    _tokens(grid[2][1], _rows(folder / E2E))
    return figure


def table(folder: Path = RESULTS) -> str:
    """Time, share of the floor and memory of each provider, on the GPU and on the CPU."""
    sides = [{row.provider: row for row in _case(folder / file, case)} for _, file, case in LOSS_CASES]
    names = list(dict.fromkeys(name for side in sides for name in side))
    head = [f"{where}: {what}" for where, *_ in LOSS_CASES for what in ("time", "of floor", "peak MiB")]
    lines = ["| " + " | ".join(["", *head]) + " |", "|" + " --- |" * (len(head) + 1)]
    for name in names:
        cells = [f"**{name}**" if name == "kdflow" else name]
        for side in sides:
            row = side.get(name)
            cells += ["", "", ""] if row is None else _cells(row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    memory = "" if row.role == "floor" else format_mib(row.peak_mib)
    return [format_seconds(row.median_s), format_percent(row.floor_percent), memory]


def _shares(axes: Axes, rows: Sequence[Row]) -> None:
    """Throughput in percent of a copy over the size of a message."""
    shown = [row for row in rows if row.case.startswith("throughput") and row.role != "floor"]
    plots.draw_lines(axes, shown, "message_bytes", "floor_percent")
    axes.set_title("Ring between two processes: rate in percent of a copy", fontsize=9, loc="left")
    axes.set_xlabel("size of a message", fontsize=8)
    axes.legend(fontsize=8, frameon=False)


def _tokens(axes: Axes, rows: Sequence[Row]) -> None:
    for position, row in enumerate(rows):
        assert row.rate is not None
        axes.barh(position, row.rate, color=plots.COLOURS[row.role])
        plots.label(axes, row.rate, position, output.format_rate(row))
    axes.set_xlabel("tokens/s, more is better", fontsize=8)
    plots.finish(axes, rows, title=f"End to end on two CPU cores: {rows[0].case}", reach=1.25)


def _rows(path: Path) -> list[Row]:
    return output.read_results(path)[1]


def _case(path: Path, case: str) -> list[Row]:
    return [row for row in _rows(path) if row.case == case]


def _shape(row: Row) -> str:
    return row.case.partition(" bf16 ")[2]
