"""Tensors handed from process to process through shared memory, without a copy.

    ring = HiddenRing.create(name="hidden", num_slots=8, slot_bytes=1 << 20)  # anywhere; give ring.handle on
    producer = HiddenRing.attach(handle, role="producer")
    with producer.reserve(ticket=17) as slot:
        slot.tensor((rows, hidden), torch.bfloat16).copy_(hidden_states)
    consumer = HiddenRing.attach(handle, role="consumer")
    with consumer.receive(ticket=17) as slot:
        loss = f(slot.tensor())

The protocol is csrc/include/kdflow/ring.hpp, its description docs/ring.md. Torch is imported by `tensor()` alone.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from kdflow import _ring
from kdflow.errors import TransportError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

Role = Literal["producer", "consumer"]

# DLPack type codes (dlpack.h, DLDataTypeCode) and bits.
_DTYPES = {
    "bool": (6, 8),
    "uint8": (1, 8),
    "uint16": (1, 16),
    "uint32": (1, 32),
    "uint64": (1, 64),
    "int8": (0, 8),
    "int16": (0, 16),
    "int32": (0, 32),
    "int64": (0, 64),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "float32": (2, 32),
    "float64": (2, 64),
    "complex64": (5, 64),
    "complex128": (5, 128),
    "float8_e4m3fn": (10, 8),
    "float8_e5m2": (12, 8),
}
_NAMES = {code: name for name, code in _DTYPES.items()}


@cache
def _dtype_code(dtype: torch.dtype | str) -> tuple[int, int]:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(_DTYPES)}, got {dtype}")
    return _DTYPES[name]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Is what lies at its address all there is to it?"""
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


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


class _Slot:
    """A held slot. Views handed out are made useless when it is given back (see docs/ring.md)."""

    _readonly: bool

    def __init__(self, lease: _ring.Lease) -> None:
        self._lease = lease
        self._tensors: list[weakref.ref[torch.Tensor]] = []
        self._buffers: list[memoryview] = []

    @property
    def ticket(self) -> int:
        return self._lease.ticket

    @property
    def generation(self) -> int:
        """Grows each time the slot is granted; never twice the same in one slot."""
        return self._lease.generation

    def _require_held(self) -> None:
        if not self._lease.held:
            raise TransportError(
                f"ticket {self.ticket}: this slot was given back; its memory belongs to the next record. "
                "Use the tensor inside the with block, or clone() it",
                ticket=self.ticket,
            )

    def _torch_view(self) -> torch.Tensor:
        import torch

        name = _NAMES[self._lease.dtype]
        if name.startswith("float8"):  # not every torch reads these from DLPack
            shape = self._lease.shape
            raw = torch.frombuffer(self._lease.bytes(readonly=False), dtype=torch.uint8)
            tensor = raw.view(getattr(torch, name)).view(shape)
        else:
            tensor = torch.from_dlpack(self._lease.dlpack())
        self._tensors.append(weakref.ref(tensor))
        return tensor

    def _byte_view(self) -> memoryview:
        view = memoryview(self._lease.bytes(readonly=self._readonly))
        self._buffers.append(view)
        return view

    def _revoke_views(self) -> None:
        for view in self._buffers:
            try:
                view.release()
            except BufferError:  # an array still exports it: only guard=True catches that one
                continue
        for reference in self._tensors:
            if (tensor := reference()) is not None:
                _empty_out(tensor)


def _empty_out(tensor: torch.Tensor) -> None:
    """Leave no element in it, and let a backward through it, or through a view of it, raise."""
    torch = sys.modules["torch"]  # an import statement costs a microsecond a record
    tensor.data = _nothing(tensor.dtype, tensor.device)
    torch.autograd.graph.increment_version(tensor)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=dtype, device=device)


class WriteSlot(_Slot):
    """A reserved slot: fill `tensor(shape, dtype)`, leave the block. An exception in it aborts the slot."""

    _readonly = False

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Writable view of the slot, uninitialised. ValueError when it does not fit slot_bytes."""
        self._set_shape(shape, dtype)
        return self._torch_view()

    def copy_from(self, source: torch.Tensor) -> None:
        """Fill the slot with a tensor that is whole already; its shape and dtype become the record's.

        From a contiguous CPU tensor this is one copy without the GIL, past the caches where the ring is larger than
        they are: faster than `tensor(...).copy_(source)`, which reads memory that it is about to overwrite.
        ValueError when it does not fit.
        """
        if _is_plain(source):
            self._set_shape(source.shape, source.dtype)
            self._lease.copy_from(source.data_ptr(), source.nbytes)
        else:
            self.tensor(source.shape, source.dtype).copy_(source)

    def _set_shape(self, shape: Sequence[int], dtype: torch.dtype | str) -> None:
        self._require_held()
        self._lease.set_shape(*_dtype_code(dtype), list(shape))

    def buffer(self, nbytes: int) -> memoryview:
        """Writable bytes of the slot, for those who have no torch; the record is uint8 (nbytes,)."""
        self._require_held()
        self._lease.set_shape(*_DTYPES["uint8"], [nbytes])
        return self._byte_view()

    @property
    def microbatch_id(self) -> int:
        return self._lease.microbatch_id

    @microbatch_id.setter
    def microbatch_id(self, value: int) -> None:
        self._lease.microbatch_id = value

    @property
    def tag(self) -> int:
        """A number of the user's own."""
        return self._lease.tag

    @tag.setter
    def tag(self, value: int) -> None:
        self._lease.tag = value

    def commit(self) -> None:
        self._revoke_views()
        self._lease.commit()

    def abort(self, reason: str) -> None:
        """Give the slot up; the consumer gets SlotAborted with this reason."""
        self._revoke_views()
        self._lease.abort(reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._lease.held:
            return
        if exc_type is None:
            self.commit()
        else:
            self.abort(f"{exc_type.__name__}: {exc}")


class ReadSlot(_Slot):
    """A received record: read `tensor()`, leave the block, and the slot is free for another record."""

    _readonly = True

    def tensor(self) -> torch.Tensor:
        """View of the slot, to be read only. Valid until release."""
        self._require_held()
        return self._torch_view()

    def buffer(self) -> memoryview:
        """The record's bytes, read-only."""
        self._require_held()
        return self._byte_view()

    @property
    def shape(self) -> tuple[int, ...]:
        return self._lease.shape

    @property
    def nbytes(self) -> int:
        return self._lease.nbytes

    @property
    def microbatch_id(self) -> int:
        return self._lease.microbatch_id

    @property
    def tag(self) -> int:
        return self._lease.tag

    @property
    def writer_pid(self) -> int:
        return self._lease.writer_pid

    def release(self) -> None:
        self._revoke_views()
        self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lease.held:
            self.release()


class _Ring:
    """What both rings share. One object may be used by several threads; a forked child attaches anew."""

    _many_consumers: bool

    def __init__(self, native: _ring.Ring) -> None:
        self._native = native

    @classmethod
    def attach(cls, source: str | int, *, role: Role, guard: bool = False) -> Self:
        """Join as a peer. `source` is a handle, or an fd of the memfd (inherited, or sent by SCM_RIGHTS).

        guard=True is for debugging: a slot's pages are inaccessible while this peer does not hold it, and
        read-only while it reads, so that every use of a view after release is a segmentation fault.
        """
        ring = cls(_ring.Ring.attach(source, role=role, guard=guard))
        if ring._native.many_consumers != cls._many_consumers:
            ring.close()
            raise ValueError(f"{ring.name}: not a {cls.__name__}; attach it with the other class")
        if ring._native.in_device_memory:
            ring.close()
            raise ValueError(f"{ring.name}: its slots are device memory; attach it as CudaRing")
        return ring

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
        """ "pid:fd": opens for processes of the same user and pid namespace while this process keeps the ring."""
        return f"{os.getpid()}:{self.fileno()}"

    def fileno(self) -> int:
        """The memfd, for inheritance or SCM_RIGHTS. Not pollable: see ready_fd()."""
        return self._native.fileno()

    def ready_fd(self) -> int:
        """Readable when try_receive() may have news (a record, or a peer that came or left).

        It is level-triggered: try_receive() clears it, so call that until it returns None.
        """
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
        return f"{type(self).__name__}({self.name!r}, {self.num_slots} x {self.slot_bytes} bytes)"


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
        if not _is_plain(tensor):
            tensor = tensor.to("cpu").resolve_conj().resolve_neg().contiguous()
        code, bits = _dtype_code(tensor.dtype)
        self._native.put(ticket, timeout_s, code, bits, tensor.shape, tensor.data_ptr(), microbatch_id, tag)

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
