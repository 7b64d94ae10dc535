"""Teachers and students take turns at a GPU: orders to sleep, and the ring that says who sleeps.

The first rank sends one order a worker through the request ring, behind everything that was asked for. A worker that
takes one sleeps, publishes an empty record under the order's ticket, and wakes when the rank gives that record back. So
no worker takes two orders, and a student that dies wakes nobody: its peers leave.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from kdflow.errors import PeerDied
from kdflow.transport.claim import claim, grant_again
from kdflow.transport.ring import HiddenRing, RequestRing
from kdflow.transport.slots import ReadSlot

_ORDER = struct.Struct("<4sQ")
_MAGIC = b"KDSL"
_TICK_S = 0.02
# While one that wakes late still looks at its record, that of its next order is another.
_SLOTS_A_WORKER = 2


@dataclass(frozen=True)
class SleepOrder:
    """One worker is to sleep until record `ticket` of the turn ring, which it publishes, is given back.

    Attributes:
        message: the order as it lies in the request ring: from a worker that dies over it another one takes it.
    """

    ticket: int
    message: ReadSlot = field(repr=False)

    @staticmethod
    def encode(ticket: int) -> bytes:
        return _ORDER.pack(_MAGIC, ticket)

    @staticmethod
    def of(message: ReadSlot) -> SleepOrder | None:
        """None where the message is something else."""
        payload = bytes(message.buffer())
        if len(payload) != _ORDER.size or not payload.startswith(_MAGIC):
            return None
        return SleepOrder(_ORDER.unpack(payload)[1], message)

    def fulfil(self, turns: HiddenRing, *, timeout_s: float) -> bool:
        """Says that this worker sleeps, and waits until it is woken; False when the students have left."""
        slot = claim(turns, self.ticket, timeout_s=timeout_s)
        if slot is None:  # it is a worker's that died after it had said so: ours is another order
            self.message.release()
            return True
        with slot:
            slot.buffer(0)
        self.message.release()
        while not turns.is_free(self.ticket + turns.num_slots):
            if not turns.peers()["consumer"]:
                return False
            time.sleep(_TICK_S)
        return True


class Turns:
    """The students' end, in the first rank.

    Args:
        workers: the request ring that each worker reads.
        ring: see create_turn_ring.
        timeout_s: longest wait for a worker to sleep, seconds.
    """

    def __init__(self, workers: Sequence[RequestRing], ring: HiddenRing, *, timeout_s: float) -> None:
        self._workers = workers
        self._ring = ring
        self._timeout_s = timeout_s
        self._next_ticket = 0
        self._asleep: list[ReadSlot] = []

    def teachers_sleep(self) -> None:
        """Returns when every worker sleeps; one that dies while it says so may come back and say it again.

        Raises:
            PeerDied: one died, and nobody will come in its place; or no worker is left.
            RingTimeout: one took too long.
        """
        first, self._next_ticket = self._next_ticket, self._next_ticket + len(self._workers)
        tickets = range(first, self._next_ticket)
        for ticket, requests in zip(tickets, self._workers, strict=True):
            requests.send(SleepOrder.encode(ticket), timeout_s=self._timeout_s)
        self._asleep = [
            self._receive(ticket, requests) for ticket, requests in zip(tickets, self._workers, strict=True)
        ]

    def wake_teachers(self) -> None:
        """Returns at once; a worker that wakes is checked before it answers anything."""
        for slot in self._asleep:
            slot.release()
        self._asleep = []

    def _receive(self, ticket: int, requests: RequestRing) -> ReadSlot:
        """An order whose worker died over the record is sent again: another one may have passed it over."""
        end = time.monotonic() + self._timeout_s
        while True:
            try:
                return self._ring.receive(ticket, timeout_s=max(0.0, end - time.monotonic()))
            except PeerDied:
                if not self._has_successor(requests) or not grant_again(self._ring, ticket):
                    raise
            requests.send(SleepOrder.encode(ticket), timeout_s=self._timeout_s)

    def _has_successor(self, requests: RequestRing) -> bool:
        """Whether a place of a worker that died is kept, as far as the ring tells: others may be its readers, too."""
        return requests.stats().consumers.live >= self._workers.count(requests)


def create_turn_ring(num_workers: int) -> HiddenRing:
    return HiddenRing.create(name="turns", num_slots=_SLOTS_A_WORKER * num_workers, slot_bytes=64)


def students_have_the_turn(ring: HiddenRing) -> bool:
    """Whether every teacher sleeps, by the records that the first rank holds: also one that died asleep."""
    return ring.stats().reading == ring.num_slots // _SLOTS_A_WORKER
