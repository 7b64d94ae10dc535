"""Points for TensorBoard."""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from kdflow.observe.files import AppendedFile


class EventFile:
    """One of TensorBoard's files in `folder`. Its own writer is a thread, which a full disk ends for good.

    Args:
        first_step: finished steps. Points of later ones in older files do not count any more.
        say: told once of points that are lost.
    """

    def __init__(self, folder: Path, *, first_step: int, say: Callable[[str], None]) -> None:
        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        start = SessionLog(status=SessionLog.START)
        header = _record(file_version="brain.Event:2") + _record(step=first_step + 1, session_log=start)
        self._file = AppendedFile(folder / name, say, header=header)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._file.append(_record(step=step, summary=Summary(value=points)))

    def close(self) -> None:
        self._file.close()


def _record(**fields: Any) -> bytes:
    """An event as it is on disk: with its length and checksums."""
    record = io.BytesIO()
    RecordWriter(record).write(Event(wall_time=time.time(), **fields).SerializeToString())
    return record.getvalue()
