"""Metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdflow.errors import ConfigError
from kdflow.observe.event_file import EventFile
from kdflow.observe.files import AppendedFile
from kdflow.training import EvalMetrics, StepMetrics


class Recorder:
    """Writes `metrics.jsonl` and `tensorboard/` in the run's folder, line by line.

    Every line has `kind` ("train", "eval" or "warning"), `time` (seconds since the epoch) and the fields
    of StepMetrics or EvalMetrics, or `text`. Numbers that are not finite are null. Where there are several teachers,
    `teachers` has an object of each, and TensorBoard their numbers under `train/NAME/` and `eval/NAME/`.

    Lines for which there is no room are lost, and the next ones are tried again.

    Args:
        folder: of the run.
        first_step: finished steps where the run begins. What an earlier process told of later ones, which are done
            again, goes.
        say: told once of lines that are lost.

    Raises:
        ConfigError: the files cannot be opened.
    """

    def __init__(self, folder: Path, *, first_step: int = 0, say: Callable[[str], None] = print) -> None:
        path = folder / "metrics.jsonl"
        try:
            if path.is_file():
                _cut(path, first_step)
            self._lines = AppendedFile(path, say)
            self._board = EventFile(folder / "tensorboard", first_step=first_step, say=say)
        except OSError as error:
            raise ConfigError(
                f"output_dir: the metrics cannot be written ({error}); make room in {folder}, or choose another folder"
            ) from None

    def on_step(self, metrics: StepMetrics) -> None:
        self._write("train", asdict(metrics))

    def on_eval(self, metrics: EvalMetrics) -> None:
        self._write("eval", asdict(metrics))

    def on_warning(self, text: str) -> None:
        self._line("warning", {"text": text})

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        teachers: dict[str, dict[str, float]] = values.pop("teachers")
        by_teacher = {"teachers": {name: _finite(own) for name, own in teachers.items()}} if teachers else {}
        self._line(kind, {**_finite(values), **by_teacher})
        step = int(values.pop("step"))
        points = {f"{kind}/{name}": value for name, value in values.items()}
        for teacher, own in teachers.items():
            points |= {f"{kind}/{teacher}/{name}": value for name, value in own.items()}
        self._board.add(step, points)

    def _line(self, kind: str, values: dict[str, Any]) -> None:
        self._lines.append(f"{json.dumps({'kind': kind, 'time': time.time(), **values})}\n".encode())


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _cut(path: Path, first_step: int) -> None:
    """Leaves the lines of the first steps; the evaluation after the last of them is done again, too."""
    kept = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the last one of a process that was killed
            continue
        match line:
            case {"kind": "train", "step": int(step)} if step > first_step:
                continue
            case {"kind": "eval", "step": int(step)} if step >= first_step:
                continue
        kept.append(f"{text}\n")
    aside = path.with_suffix(".writing")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)
