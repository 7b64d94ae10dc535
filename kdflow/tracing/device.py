"""Spans on a GPU: when its stream came to what the host queued between a span's begin and end."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch

from kdflow.tracing.spans import SpanFile


@dataclass
class _Span:
    name: str
    args: dict[str, int]
    start: torch.cuda.Event
    end: torch.cuda.Event


class DeviceSpans:
    """Two events a span, read once the device is past them.

    At the end of each step, when the device has nothing left to do, one more event ties its clock to
    the host's: so the two do not drift apart, and elapsed times stay short enough for their 32 bits.

    Args:
        device: its current stream, as of now, is the one that spans are of.
    """

    def __init__(self, file: SpanFile, device: torch.device) -> None:
        self._file = file
        self._device = device
        self._stream = torch.cuda.current_stream(device)
        self._open: list[tuple[str, dict[str, int], torch.cuda.Event]] = []
        self._unread: deque[_Span] = deque()
        self._anchor, self._anchor_ns = self._now()

    def begin(self, name: str, args: dict[str, int]) -> None:
        self._open.append((name, args, self._event()))

    def end(self) -> None:
        name, args, start = self._open.pop()
        self._unread.append(_Span(name, args, start, self._event()))

    def end_of_step(self) -> None:
        # Spans are read against the anchor before them, so that elapsed times are positive.
        anchor, anchor_ns = self._now()
        while self._unread and self._unread[0].end.query():
            span = self._unread.popleft()
            self._file.add(span.name, self._at(span.start), self._at(span.end), span.args)
        self._anchor, self._anchor_ns = anchor, anchor_ns
        self._file.flush()

    def close(self) -> None:
        self.end_of_step()
        self._file.close()

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def _now(self) -> tuple[torch.cuda.Event, int]:
        """An event and the host's time right after it came."""
        event = self._event()
        event.synchronize()
        return event, time.monotonic_ns()

    def _at(self, event: torch.cuda.Event) -> int:
        return self._anchor_ns + round(self._anchor.elapsed_time(event) * 1e6)
