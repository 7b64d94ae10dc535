"""Requests one way, hidden states the other: the channel between student and teacher.

A student rank owns one data ring and sends into request rings: each teacher has one, which all
ranks and all of its workers share. It asks for microbatch k only when slot k % num_slots is free,
so a teacher never waits for room, may answer in any order, and the slots are the prefetch window.
"""

from __future__ import annotations

import struct
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from kdflow.errors import PeerDied, RingCorrupt, RingTimeout
from kdflow.tracing import OFF, Trace
from kdflow.transport.claim import claim, grant_again
from kdflow.transport.cuda_ring import CudaRing
from kdflow.transport.ring import HiddenRing, RequestRing
from kdflow.transport.slots import ReadSlot
from kdflow.transport.turns import SleepOrder
from kdflow.types import Microbatch

if TYPE_CHECKING:
    import torch

# magic, rank, ticket, T tokens, B samples, N loss rows; then T + B + N int32.
_HEADER = struct.Struct("<4sIQIII")
_MAGIC = b"KDRQ"
_LOOK_S = 1.0  # a student that waits looks so often whether its teacher lives


@dataclass(frozen=True)
class PrefillRequest:
    """Hidden states of these rows, please, into slot `ticket` of ring `rank`."""

    rank: int
    ticket: int
    microbatch: Microbatch

    def encode(self) -> bytes:
        m = self.microbatch
        header = _HEADER.pack(
            _MAGIC,
            self.rank,
            self.ticket,
            m.num_tokens,
            len(m.sequence_lengths),
            m.num_loss_tokens,
        )
        lengths = np.asarray(m.sequence_lengths, np.int32)
        return b"".join((header, m.input_ids.tobytes(), lengths.tobytes(), m.loss_rows.tobytes()))

    @staticmethod
    def decode(payload: bytes) -> PrefillRequest:
        """Reads a request; its numbers are not trusted.

        Raises:
            RingCorrupt: they do not fit the payload or one another.
        """
        if len(payload) < _HEADER.size:
            raise RingCorrupt(f"request of {len(payload)} bytes is shorter than its header")
        magic, rank, ticket, num_tokens, num_samples, num_rows = _HEADER.unpack_from(payload)
        counts = (num_tokens, num_samples, num_rows)
        if magic != _MAGIC or len(payload) != _HEADER.size + 4 * sum(counts):
            raise RingCorrupt(f"request of {len(payload)} bytes announces {counts} numbers")
        numbers = np.frombuffer(payload, np.int32, offset=_HEADER.size).copy()  # writable for torch
        input_ids, lengths, rows = np.split(numbers, (num_tokens, num_tokens + num_samples))
        if (lengths < 1).any() or lengths.sum() != num_tokens:
            raise RingCorrupt(f"request: sample lengths do not add up to {num_tokens} tokens")
        if num_rows and (rows.min() < 0 or rows.max() >= num_tokens):
            raise RingCorrupt(f"request: loss rows outside its {num_tokens} tokens")
        return PrefillRequest(rank, ticket, Microbatch(input_ids, tuple(lengths.tolist()), rows))


def request_bytes(num_tokens: int) -> int:
    """Largest encoded request of a microbatch with `num_tokens` tokens."""
    return _HEADER.size + 4 * 3 * num_tokens


class PendingRows:
    """Hidden states that were asked for; a context manager that frees their slot.

    Attributes:
        microbatch: whose loss rows they are.
        waited_s: how long the student stood still before it was handed out, seconds.
    """

    waited_s = 0.0

    def __init__(
        self,
        microbatch: Microbatch,
        receive: Callable[[], ReadSlot],
        on_release: Callable[[], None],
    ) -> None:
        self.microbatch = microbatch
        self._receive = receive
        self._on_release = on_release
        self._slot: ReadSlot | None = None

    def tensor(self) -> torch.Tensor:
        """(N, H) view into the ring, valid until `release` or the block's end; the first call waits for it.

        From a CudaRing it is on the ring's device, complete, for use on the current stream.

        Raises:
            PeerDied: the teacher died over it.
            RingTimeout: it took longer than the channel's timeout.
        """
        return self._received().tensor()

    def wait(self) -> None:
        """Until they are there; raises as `tensor` does."""
        self._received()

    @property
    def prefill_s(self) -> float:
        """How long the teacher worked on it, seconds."""
        return self._received().tag * 1e-9

    def release(self) -> None:
        """Frees the slot before the block ends, and asks for what comes next."""
        self._received().release()
        self._on_release()

    def give_back(self) -> None:
        """Frees the slot if it is not free yet, read or not."""
        self._received().__exit__(None, None, None)

    def _received(self) -> ReadSlot:
        if self._slot is None:
            self._slot = self._receive()
        return self._slot

    def __enter__(self) -> PendingRows:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._slot is not None or error is None:
            self._received().__exit__(kind, error, trace)


class HiddenStatesClient:
    """The student's end: asks ahead and hands over views.

    Args:
        requests: ring that every worker of a teacher reads, by the teacher's name.
        hidden: the data ring of this rank, in which all teachers answer.
        rank: tells the teacher which data ring to answer into.
        timeout_s: longest wait for one answer or for room to ask, seconds.
        max_resends: how often a microbatch is asked for again whose teacher died over it.
    """

    def __init__(
        self,
        requests: Mapping[str, RequestRing],
        hidden: HiddenRing | CudaRing,
        *,
        rank: int,
        timeout_s: float,
        max_resends: int = 0,
    ) -> None:
        self._requests = requests
        self._hidden = hidden
        self._rank = rank
        self._timeout_s = timeout_s
        self._max_resends = max_resends
        self._next_ticket = 0
        self._asked: dict[int, PendingRows] = {}  # by slot, the last one each

    def prefetch(self, microbatches: Iterable[Microbatch]) -> Iterator[PendingRows]:
        """Yields the microbatches in order, with requests for the next ones already sent.

        Each must be released (or leave its `with` block) before the next is taken. What nobody has read, because a
        loop or a block was left early, is given back when its slot is asked for again.
        """
        source, pending = iter(microbatches), deque[PendingRows]()

        def ask() -> None:
            """For as many as there are free slots, and for one in any case."""
            while not pending or self._hidden.is_free(self._next_ticket):
                if (microbatch := next(source, None)) is None:
                    break
                pending.append(self._request(microbatch, ask))

        ask()
        while pending:
            yield pending.popleft()
            ask()

    @property
    def num_slots(self) -> int:
        """Microbatches that may be asked for at one time."""
        return self._hidden.num_slots

    def ask(self, microbatches: Sequence[Microbatch]) -> list[PendingRows]:
        """Asks for all of them at once, `num_slots` at most; earlier ones must have been released.

        Raises:
            ValueError: they are more.
        """
        if len(microbatches) > self.num_slots:
            raise ValueError(
                f"microbatches: expected at most {self.num_slots}, the slots of the ring, got {len(microbatches)}; "
                "ask for them in parts"
            )
        return [self._request(microbatch, lambda: None) for microbatch in microbatches]

    def _request(self, microbatch: Microbatch, on_release: Callable[[], None]) -> PendingRows:
        ticket = self._next_ticket
        if (earlier := self._asked.get(ticket % self.num_slots)) is not None:
            earlier.give_back()
        request = PrefillRequest(self._rank, ticket, microbatch.for_teacher())
        requests = self._requests[microbatch.teacher_name]
        requests.send(request.encode(), timeout_s=self._timeout_s)
        self._next_ticket += 1  # one that could not be sent is nobody's to answer, and would block its slot
        rows = PendingRows(microbatch, lambda: self._receive(request, requests), on_release)
        self._asked[ticket % self.num_slots] = rows
        return rows

    def _receive(self, request: PrefillRequest, requests: RequestRing) -> ReadSlot:
        """The answer; a request that died with its teacher is sent again, for a teacher that lives or comes back."""
        num_resends = 0
        while True:
            try:
                return self._wait(request.ticket, requests)
            except PeerDied:
                if num_resends == self._max_resends or not grant_again(self._hidden, request.ticket):
                    raise
            requests.send(request.encode(), timeout_s=self._timeout_s)
            num_resends += 1

    def _wait(self, ticket: int, requests: RequestRing) -> ReadSlot:
        """The data ring knows whether any teacher lives, the request ring whether the one that was asked does."""
        end = time.monotonic() + self._timeout_s
        deserted = False
        while True:
            left_s = 0.0 if deserted else max(0.0, end - time.monotonic())
            try:
                return self._hidden.receive(ticket, timeout_s=min(left_s, _LOOK_S))
            except RingTimeout as nothing:
                if deserted:
                    raise PeerDied(f"{requests.name}: nobody is left to answer request {ticket}") from None
                if left_s <= _LOOK_S:
                    raise RingTimeout(f"{nothing} (waited {self._timeout_s:g} s in all)") from None
                workers = requests.stats().consumers
                deserted = workers.attached > 0 and workers.live == 0


class HiddenStatesServer:
    """A teacher worker's end: takes requests and gives each its slot.

    Args:
        requests: ring that every student rank writes.
        hidden: the data ring of each rank.
        timeout_s: longest wait for a slot, seconds.
    """

    def __init__(self, requests: RequestRing, hidden: Mapping[int, HiddenRing | CudaRing], *, timeout_s: float) -> None:
        self._requests = requests
        self._hidden = hidden
        self._timeout_s = timeout_s

    def serve(
        self,
        hidden_size: int,
        dtype: torch.dtype,
        prefill: Callable[[Microbatch, torch.Tensor], float],
        *,
        limit: int | None = None,
        trace: Trace = OFF,
    ) -> SleepOrder | bool:
        """Answers requests until every student has left, `limit` are answered or an order to sleep comes.

        Args:
            prefill: writes the rows of a microbatch into `out` (N, hidden_size) and returns the
                seconds it took. Its exception aborts the slot, of which the student is told.
            trace: gets the phases of each request.

        Returns:
            The order, or whether there is more to do: False when the students have left.
        """
        num_answered = 0
        while limit is None or num_answered < limit:
            try:
                message = self._requests.lease(timeout_s=1.0)
            except RingTimeout:
                continue
            except PeerDied:
                return False
            if (order := SleepOrder.of(message)) is not None:
                return order
            # The request stays in the ring until its slot is ours: a worker that dies before
            # leaves it to another one, a worker that dies after leaves an abandoned slot.
            with message:
                request = PrefillRequest.decode(bytes(message.buffer()))
                whose = {"rank": request.rank, "ticket": request.ticket}
                ring = self._hidden[request.rank]
                trace.phase("wait for slot", **whose)
                try:
                    slot = claim(ring, request.ticket, timeout_s=self._timeout_s)
                except RingTimeout as error:
                    # It keeps its slots from us, and its own wait will tell it; the other students go on.
                    warnings.warn(f"request of rank {request.rank} dropped: {error}", RuntimeWarning, stacklevel=2)
                    slot = None
            if slot is None:  # whether other students are there, the next lease knows
                trace.phase()
                continue
            with slot:
                trace.phase("prefill", tokens=request.microbatch.num_tokens, **whose)
                rows = slot.tensor((request.microbatch.num_loss_tokens, hidden_size), dtype)
                slot.tag = round(prefill(request.microbatch, rows) * 1e9)
                trace.phase("publish", **whose)
            trace.phase()
            trace.end_of_step()
            num_answered += 1
        return True
