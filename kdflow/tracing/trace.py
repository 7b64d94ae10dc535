"""Spans and phases of one process, handed to whoever records them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol


class Recorder(Protocol):
    """Hears where spans begin and end, properly nested, all from one thread."""

    def begin(self, name: str, args: dict[str, int]) -> None: ...

    def end(self) -> None: ...

    def end_of_step(self) -> None:
        """A step is done, and with it what it queued on the device: the moment for what takes time."""
        ...

    def close(self) -> None: ...


class Trace:
    """Named spans that nest, and inside each a row of phases of which the next one ends the last.

    Without recorders nothing is kept and a call costs a fraction of a microsecond.
    """

    def __init__(self, recorders: Sequence[Recorder] = ()) -> None:
        self._recorders = tuple(recorders)
        # For each open span, the outermost being the process itself, whether a phase is under way in it.
        self._in_phase = [False]

    @contextmanager
    def span(self, name: str, **args: int) -> Iterator[None]:
        if not self._recorders:
            yield
            return
        self._begin(name, args)
        self._in_phase.append(False)
        try:
            yield
        finally:
            self._end_phase()
            self._in_phase.pop()
            self._end()

    def phase(self, name: str | None = None, **args: int) -> None:
        """Ends the innermost span's phase and begins another one; None begins none."""
        if not self._recorders:
            return
        self._end_phase()
        if name is not None:
            self._begin(name, args)
            self._in_phase[-1] = True

    def end_of_step(self) -> None:
        for recorder in self._recorders:
            recorder.end_of_step()

    def close(self) -> None:
        while len(self._in_phase) > 1:
            self._end_phase()
            self._in_phase.pop()
            self._end()
        self._end_phase()
        for recorder in self._recorders:
            recorder.close()

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self, name: str, args: dict[str, int]) -> None:
        for recorder in self._recorders:
            recorder.begin(name, args)

    def _end(self) -> None:
        for recorder in reversed(self._recorders):
            recorder.end()

    def _end_phase(self) -> None:
        if self._in_phase[-1]:
            self._end()
            self._in_phase[-1] = False


OFF = Trace()
