"""Metrics as JSON lines and for TensorBoard."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from kdflow.training import EvalMetrics, StepMetrics


class Recorder:
    """Writes `metrics.jsonl` and `tensorboard/` in the run's folder, line by line.

    Every line has `kind` ("train" or "eval"), `time` (seconds since the epoch) and the fields
    of StepMetrics or EvalMetrics.
    """

    def __init__(self, folder: Path) -> None:
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(folder / "tensorboard")

    def on_step(self, metrics: StepMetrics) -> None:
        self._write("train", asdict(metrics))

    def on_eval(self, metrics: EvalMetrics) -> None:
        self._write("eval", asdict(metrics))

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def _write(self, kind: str, values: dict[str, float]) -> None:
        self._lines.write(json.dumps({"kind": kind, "time": time.time(), **values}) + "\n")
        self._lines.flush()
        step = int(values.pop("step"))
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
