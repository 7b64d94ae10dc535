"""Ctrl-C and SIGTERM while a run trains."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_TOLD = b"\nstopping after this step, with a checkpoint; once more ends at once, without one\n"


class StopRequest:
    """The first signal asks for a stop after the step, the second one interrupts."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        with suppress(OSError):  # nobody may read it any more
            os.write(2, _TOLD)  # `print` may be what the signal came into

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(n, self._on_signal) for n in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
