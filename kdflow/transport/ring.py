"""Tensors handed from process to process through shared memory, without a copy.

    ring = HiddenRing.create(name="hidden", num_slots=8, slot_bytes=1 << 20)  # anywhere
    handle = ring.handle  # a string for the other processes
    producer = HiddenRing.attach(handle, role="producer")
    with producer.reserve(ticket=0) as slot:
        slot.tensor((rows, hidden), torch.bfloat16).copy_(hidden_states)
    consumer = HiddenRing.attach(handle, role="consumer")
    with consumer.receive(ticket=0) as slot:
        loss = f(slot.tensor())

The protocol is csrc/include/kdflow/ring.hpp, its description docs/ring.md. Torch is imported by `tensor()` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kdflow import _ring
from kdflow.errors import TransportError
from kdflow.transport.slots import ReadSlot, WriteSlot, address_of, dtype_code, is_plain

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

Role = Literal["producer", "consumer"]


@dataclass(frozen=True)
class SideStats:
    """One side of a ring. A wait is a call that had to sleep; wait_s is their sum."""

    attached: int
    live: int
    records: int
    bytes: int
    waits: int
    wait_s: float


@dataclass(frozen=True)
class RingStats:
    """Counters since the ring was made, over all processes; depth, writing and reading are slots now."""

    num_slots: int
    depth: int
    writing: int
    reading: int
    producers: SideStats
    consumers: SideStats
    died: int
    abandoned: int
    aborted: int
    reclaimed: int
    lost: int


class _Ring:
    """What both rings share. One object may be used by several threads; a forked child attaches anew."""

    _many_consumers: bool

    def __init__(self, native: _ring.Ring, *, is_peer: bool = False) -> None:
        self._native = native
        self._is_peer = is_peer

    @classmethod
    def attach(cls, source: str | int, *, role: Role, guard: bool = False) -> Self:
        """Join as a peer. `source` is a handle, or an fd of the memfd (inherited, or sent by SCM_RIGHTS).

        guard=True is for debugging: a slot's pages are inaccessible while this peer does not hold it, and
        read-only while it reads, so that every use of a view after release is a segmentation fault.
        """
        native = _ring.Ring.attach(
            source, role=role, many_consumers=cls._many_consumers, in_device_memory=False, guard=guard
        )
        return cls(native, is_peer=True)

    @property
    def name(self) -> str:
        return self._native.name

    @property
    def num_slots(self) -> int:
        return self._native.num_slots

    @property
    def slot_bytes(self) -> int:
        return self._native.slot_bytes

    @property
    def handle(self) -> str:
        """ "pid:fd:id": opens for processes of the same user and pid namespace while this process keeps the ring."""
        return self._native.handle

    def fileno(self) -> int:
        """The memfd, for inheritance or SCM_RIGHTS. Not pollable: see ready_fd()."""
        return self._native.fileno()

    def ready_fd(self) -> int:
        """Readable when try_receive() may have news (a record, or a peer that came or left).

        It is level-triggered: try_receive() clears it, so call that until it returns None.
        """
        if not self._is_peer:
            raise TransportError(f"{self.name}: created but not attached; attach() with a role first")
        return self._native.ready_fd()

    def peers(self) -> dict[Role, tuple[int, ...]]:
        """Pids of the living, by role."""
        living = self._native.peers()
        return {
            "producer": tuple(pid for role, pid in living if role == "producer"),
            "consumer": tuple(pid for role, pid in living if role == "consumer"),
        }

    def wait_for_peer(self, *, timeout_s: float = 60.0) -> None:
        """Wait until somebody of the other role is attached."""
        self._native.wait_for_peer(timeout_s)

    def stats(self) -> RingStats:
        stats = self._native.stats()
        sides = {side: SideStats(**stats.pop(side)) for side in ("producers", "consumers")}
        return RingStats(num_slots=self.num_slots, **sides, **stats)

    def close(self) -> None:
        """Leave. Slots still held are given back: written ones aborted, read ones ready for another reader."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        size = "closed" if self._native.closed else f"{self.num_slots} x {self.slot_bytes} bytes"
        return f"{type(self).__name__}({self.name!r}, {size})"


class HiddenRing(_Ring):
    """Tensors from several producers to one consumer, which reads them in place."""

    _many_consumers = False

    @classmethod
    def create(
        cls,
        *,
        name: str,
        num_slots: int,
        slot_bytes: int,
        checksum: bool = False,
        huge_pages: bool = False,
        numa_node: int | None = None,
    ) -> Self:
        """Allocate the memory. The creator is not a peer: attach() to take part.

        checksum: crc32c of each payload, made at commit and checked at receive.
        huge_pages: from the pool of vm.nr_hugepages. numa_node: preferred node of the memory.
        """
        return cls(
            _ring.Ring.create(
                name=name,
                many_consumers=False,
                num_slots=num_slots,
                slot_bytes=slot_bytes,
                checksum=checksum,
                huge_pages=huge_pages,
                numa_node=numa_node,
            )
        )

    def reserve(self, ticket: int | None = None, *, timeout_s: float = 30.0) -> WriteSlot:
        """Producer: take the slot of a ticket the consumer granted, or (None) of the next one in order.

        Waits while the slot holds an earlier record. RingTimeout; PeerDied when the consumer is gone;
        TransportError when the ticket is another producer's, or over.
        """
        return WriteSlot(self._native.reserve(ticket, timeout_s))

    def put(
        self,
        tensor: torch.Tensor,
        ticket: int | None = None,
        *,
        microbatch_id: int = 0,
        tag: int = 0,
        timeout_s: float = 30.0,
    ) -> None:
        """Producer: hand over a copy of a whole tensor: `reserve`, `copy_from` and `commit` in one native call.

        Raises as reserve does; ValueError, and the ticket stays as it was, when the tensor does not fit.
        """
        if not is_plain(tensor):
            tensor = tensor.to("cpu").resolve_conj().resolve_neg().contiguous()
        code, bits = dtype_code(tensor.dtype)
        self._native.put(ticket, timeout_s, code, bits, tensor.shape, address_of(tensor), microbatch_id, tag)

    def receive(self, ticket: int | None = None, *, timeout_s: float = 30.0) -> ReadSlot:
        """Consumer: wait for the record of a ticket, or (None) for the next one in order.

        RingTimeout; PeerDied when its producer died while writing, or no producer is left; SlotAborted;
        RingCorrupt. After PeerDied, SlotAborted and RingCorrupt a ticket can be given again: reclaim().
        In order there is nobody to give it again: the record is reported once, and the next call goes on.
        """
        return ReadSlot(self._native.receive(ticket, timeout_s))

    def try_receive(self, ticket: int | None = None) -> ReadSlot | None:
        """As receive, without waiting."""
        lease = self._native.try_receive(ticket)
        return None if lease is None else ReadSlot(lease)

    def is_free(self, ticket: int) -> bool:
        """May this ticket be granted? True when its slot is free for it."""
        return self._native.is_free(ticket)

    def reclaim(self, ticket: int) -> None:
        """Consumer: make an abandoned or aborted ticket free, to be granted again."""
        self._native.reclaim(ticket)


class RequestRing(_Ring):
    """Small messages from several senders (role "producer") to several receivers (role "consumer")."""

    _many_consumers = True

    @classmethod
    def create(cls, *, name: str, num_slots: int, slot_bytes: int) -> Self:
        """Allocate the memory. The creator is not a peer: attach() to take part."""
        return cls(
            _ring.Ring.create(
                name=name,
                many_consumers=True,
                num_slots=num_slots,
                slot_bytes=slot_bytes,
                checksum=False,
                huge_pages=False,
                numa_node=None,
            )
        )

    def send(self, payload: bytes | bytearray | memoryview, *, timeout_s: float = 30.0) -> None:
        """Append a message. RingTimeout when the ring stays full; PeerDied when no receiver is left."""
        self._native.send(payload, timeout_s)

    def receive(self, *, timeout_s: float = 30.0) -> bytes:
        """Take the oldest message."""
        with self.lease(timeout_s=timeout_s) as slot:
            return bytes(slot.buffer())

    def try_receive(self) -> bytes | None:
        """As receive, without waiting."""
        slot = self.try_lease()
        if slot is None:
            return None
        with slot:
            return bytes(slot.buffer())

    def lease(self, *, timeout_s: float = 30.0) -> ReadSlot:
        """Take the oldest message, but for good only at the end of the block.

        A receiver that dies in the block leaves the message to another one: a worker that reserves the
        answer's slot inside the block loses no request.
        """
        return ReadSlot(self._native.receive(None, timeout_s))

    def try_lease(self) -> ReadSlot | None:
        """As lease, without waiting."""
        lease = self._native.try_receive(None)
        return None if lease is None else ReadSlot(lease)
