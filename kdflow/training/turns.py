"""When teachers prefill: beside the student, or in turns with it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Protocol

import torch
import torch.distributed as dist

from kdflow.training.loop import HiddenRows
from kdflow.types import Microbatch


class PendingRows(HiddenRows, Protocol):
    """Rows that may be waited for before they are used."""

    def wait(self) -> None: ...


class Client(Protocol):
    """Asks teachers for hidden states, for as many microbatches at a time as there are slots."""

    @property
    def num_slots(self) -> int: ...

    def prefetch(self, microbatches: Iterable[Microbatch]) -> Iterator[PendingRows]: ...

    def ask(self, microbatches: Sequence[Microbatch]) -> Sequence[PendingRows]: ...


class Turns(Protocol):
    """Sends all teachers to sleep and wakes them."""

    def teachers_sleep(self) -> None: ...

    def wake_teachers(self) -> None: ...


class Overlap:
    """Teachers run ahead of the student by the slots of its ring."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def prefetch(self, work: Iterator[Sequence[Microbatch]]) -> Iterator[PendingRows]:
        return self._client.prefetch(chain.from_iterable(work))


class Colocate:
    """Teachers prefill a window of microbatches, and sleep while the student trains through it.

    What is done at one time is as many optimizer steps or evaluations as the slots of the ring hold, and of one that
    is larger than the ring a part. Every rank has the same windows, for it has as many microbatches of each step.

    Args:
        client: asks for hidden states.
        turns: sends the teachers to sleep; None on all ranks but the first.
        device: of the student, whose unused memory is given back before teachers wake.
    """

    def __init__(self, client: Client, turns: Turns | None, *, device: torch.device) -> None:
        self._client = client
        self._turns = turns
        self._device = device

    def prefetch(self, work: Iterator[Sequence[Microbatch]]) -> Iterator[PendingRows]:
        for window in windows(work, self._client.num_slots):
            start = time.perf_counter()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            _meet()  # all students have given their memory back
            if self._turns is not None:
                self._turns.wake_teachers()
            pending = self._client.ask(window)
            for rows in pending:
                rows.wait()
            _meet()  # all answers are there
            if self._turns is not None:
                self._turns.teachers_sleep()
            _meet()  # all teachers have given theirs back
            pending[0].waited_s = time.perf_counter() - start
            yield from pending


def windows(work: Iterable[Sequence[Microbatch]], num_slots: int) -> Iterator[list[Microbatch]]:
    """Whole pieces of work, as many as `num_slots` microbatches hold; one that is larger alone and in parts."""
    window: list[Microbatch] = []
    for piece in work:
        if len(window) + len(piece) > num_slots:
            if window:
                yield window
            *parts, window = [list(piece[i : i + num_slots]) for i in range(0, len(piece), num_slots)]
            yield from parts
        else:
            window += piece
    if window:
        yield window


def _meet() -> None:
    dist.all_reduce(torch.zeros(()))  # on the host, whatever the device: the wait is the host's
