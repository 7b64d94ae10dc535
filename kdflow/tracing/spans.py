"""Spans on the host's clock, written to a file of the process as JSON lines.

The clock is CLOCK_MONOTONIC, which all processes of a node share.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

MAX_UNWRITTEN = 512
# Tracks of a process: of the host's clock, and when its GPU came to it.
HOST, GPU = "host", "GPU"


class SpanFile:
    """First a line that says whose spans these are, then one line a span, those that end first in front."""

    def __init__(self, path: Path, role: str, index: int, track: str) -> None:
        self._file = path.open("w", encoding="utf-8")
        self._lines = [json.dumps({"role": role, "index": index, "track": track, "pid": os.getpid()})]
        self.flush()

    def add(self, name: str, start_ns: int, end_ns: int, args: dict[str, int]) -> None:
        self._lines.append(json.dumps([name, start_ns, end_ns, args]))
        if len(self._lines) >= MAX_UNWRITTEN:
            self.flush()

    def flush(self) -> None:
        if self._lines:
            self._file.write("\n".join(self._lines) + "\n")
            self._file.flush()
            self._lines.clear()

    def close(self) -> None:
        self.flush()
        self._file.close()


class HostSpans:
    """Records when the host entered and left."""

    def __init__(self, file: SpanFile) -> None:
        self._file = file
        self._open: list[tuple[str, int, dict[str, int]]] = []

    def begin(self, name: str, args: dict[str, int]) -> None:
        self._open.append((name, time.monotonic_ns(), args))

    def end(self) -> None:
        name, start_ns, args = self._open.pop()
        self._file.add(name, start_ns, time.monotonic_ns(), args)

    def end_of_step(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()
