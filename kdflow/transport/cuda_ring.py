"""Tensors handed from GPU to GPU, process to process, in the order of streams and without Python waiting.

    made = CudaRing.create(name="hidden", num_slots=8, slot_bytes=1 << 24, placement="device")  # needs no GPU
    handle = made.handle  # a string for the other processes
    producer = CudaRing.attach(handle, role="producer", device=1)
    with producer.reserve(ticket=0) as slot:
        torch.index_select(hidden_states, 0, rows, out=slot.tensor((len(rows), hidden), torch.bfloat16))
    consumer = CudaRing.attach(handle, role="consumer", device=0)
    with consumer.receive(ticket=0) as slot:
        loss = f(slot.tensor())

placement="device": the slots are memory of the consumer's GPU, which producers write over CUDA IPC.
placement="pinned": the slots are host memory; any HiddenRing can be attached so, by either side or both.

Leaving the block returns at once; the record is published, or the slot freed, when the GPU has done what was enqueued
on the slot's stream by then. Protocol and reasons: docs/cuda_ring.md.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from kdflow import _ring
from kdflow.errors import TransportError
from kdflow.transport.cuda import describe_array, device_ordinal, stream_handle
from kdflow.transport.ring import Role, _Ring
from kdflow.transport.slots import DTYPE_NAMES, ReadSlot, Slot, WriteSlot

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

# Where a GPU is there are cores to spare: records that are a millisecond apart are met awake.
_MAX_SPIN_US = 1000
# Array-interface codes of the dtypes that have one; bfloat16 and float8 travel through DLPack only.
_TYPESTR_KINDS = {0: "i", 1: "u", 2: "f", 5: "c", 6: "b"}


class SlotArray:
    """A slot's memory for cupy (`cupy.asarray(slot.array())`), numba and others. Valid until the slot is given back.

    The data is complete when it is handed out, so no stream has to wait for another.
    """

    def __init__(self, slot: CudaWriteSlot | CudaReadSlot) -> None:
        self._slot = slot

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        lease = self._slot._held_lease()
        code, bits = lease.dtype
        if code not in _TYPESTR_KINDS:
            raise AttributeError(f"{DTYPE_NAMES[lease.dtype]} has no typestr; use DLPack")
        order = "|" if bits == 8 else "<"
        return {
            "version": 3,
            "shape": lease.shape,
            "typestr": f"{order}{_TYPESTR_KINDS[code]}{bits // 8}",
            "data": (lease.address, False),
            "stream": None,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self._slot._ordinal)  # kDLCUDA

    def __dlpack__(self, *, stream: Any = None, **_newer: Any) -> Any:
        return self._slot._held_lease().dlpack(self._slot._ordinal)


class _CudaSlot(Slot):
    """What the slots of both sides share. `stream` is the one that their last use is enqueued on."""

    _lease: Any  # _ring.StreamLease
    _staged: torch.Tensor | None = None  # in a pinned ring, what tensor() gave

    def __init__(self, lease: _ring.StreamLease, ring: CudaRing) -> None:
        super().__init__(lease)  # type: ignore[arg-type]
        self._ordinal = ring.device
        self._in_device_memory = ring.in_device_memory

    @property
    def stream(self) -> int:
        return self._lease.stream

    def use_stream(self, stream: Any) -> None:
        """The slot is given back after what is on this stream, in place of the one it was taken with."""
        self._lease.stream = stream_handle(stream, self._ordinal)
        if self._staged is not None:
            self._keep_for_stream(self._staged)

    def _held_lease(self) -> _ring.StreamLease:
        self._require_held()
        return self._lease

    def _new_tensor(self) -> torch.Tensor:
        return super()._new_tensor() if self._in_device_memory else self._staging()

    def _dlpack(self) -> Any:
        return self._lease.dlpack(self._ordinal)

    def _staging(self) -> torch.Tensor:
        import torch

        device = torch.device("cuda", self._ordinal)
        dtype = getattr(torch, DTYPE_NAMES[self._lease.dtype])
        self._staged = torch.empty(self._lease.shape, dtype=dtype, device=device)
        self._keep_for_stream(self._staged)
        return self._staged

    def _keep_for_stream(self, staged: torch.Tensor) -> None:
        """Its memory is no other tensor's before the slot's stream, which copies it, has passed."""
        import torch

        # Handle 0 would make an ExternalStream of torch's pool, another one.
        default = torch.cuda.default_stream(staged.device)
        stream = torch.cuda.ExternalStream(self.stream, device=staged.device) if self.stream else default
        staged.record_stream(stream)

    def _byte_view(self) -> memoryview:
        raise TransportError(
            f"ticket {self.ticket}: buffer() would read memory that a stream may still be writing; "
            "use tensor(), array(), copy_from() or copy_to()",
            ticket=self.ticket,
        )

    def _require_in_device_memory(self) -> None:
        if not self._in_device_memory:
            raise TransportError(
                f"ticket {self.ticket}: this ring's slots are host memory, no kernel's; use copy_from() or copy_to()",
                ticket=self.ticket,
            )


class CudaWriteSlot(_CudaSlot, WriteSlot):
    """A reserved slot: enqueue writes to `tensor(shape, dtype)` or `copy_from(tensor)`, leave the block."""

    def array(self, shape: Sequence[int], dtype: str) -> SlotArray:
        """The slot for cupy and others, uninitialised; dtype by its name, as "float32"."""
        self._require_in_device_memory()
        self._set_shape(shape, dtype)
        return SlotArray(self)

    def copy_from(self, source: Any) -> None:
        """Enqueue a copy of a whole tensor, or array with __cuda_array_interface__, into the slot."""
        array = describe_array(source, self._ordinal)
        self._require_held()
        self._lease.set_shape(*array.dtype, array.shape)
        self._lease.copy_from(array.address, array.nbytes)

    def commit(self) -> None:
        if self._staged is not None:
            self._lease.copy_from(self._staged.data_ptr(), self._lease.nbytes)
            self._staged = None
        super().commit()


class CudaReadSlot(_CudaSlot, ReadSlot):
    """A received record, complete: enqueue reads of `tensor()` or `copy_to(tensor)`, leave the block."""

    def array(self) -> SlotArray:
        """The record for cupy and others, to be read only."""
        self._require_in_device_memory()
        self._require_held()
        return SlotArray(self)

    def copy_to(self, target: Any) -> None:
        """Enqueue a copy of the record into a tensor, or array with __cuda_array_interface__, of as many bytes."""
        self._require_held()
        array = describe_array(target, self._ordinal)
        if array.nbytes != self.nbytes:
            raise ValueError(f"target: expected {self.nbytes} bytes, those of {self.shape}, got {array.nbytes}")
        self._lease.copy_to(array.address, array.nbytes)

    def _staging(self) -> torch.Tensor:
        if self._staged is not None:
            return self._staged
        tensor = super()._staging()
        self._lease.copy_to(tensor.data_ptr(), self.nbytes)
        return tensor


class CudaRing(_Ring):
    """Tensors from several producers to one consumer, GPU to GPU. Same words as HiddenRing, plus streams.

    `stream` is a torch or cupy stream, an object with __cuda_stream__, or a handle; None is torch's current
    stream, or the default stream without torch.
    """

    _many_consumers = False
    _stage: _ring.Stage
    _finalizer: weakref.finalize[Any, Any]
    device: int

    @classmethod
    def create(
        cls,
        *,
        name: str,
        num_slots: int,
        slot_bytes: int,
        placement: Literal["device", "pinned"],
        numa_node: int | None = None,
    ) -> Self:
        """Make the host side. Needs no GPU, and the creator is no peer: attach() to take part."""
        if placement not in ("device", "pinned"):
            raise ValueError(f'placement: expected "device" or "pinned", got {placement!r}')
        return cls(
            _ring.Ring.create(
                name=name,
                many_consumers=False,
                num_slots=num_slots,
                slot_bytes=slot_bytes,
                checksum=False,
                huge_pages=False,
                numa_node=numa_node,
                in_device_memory=placement == "device",
            )
        )

    @classmethod
    def attach(cls, source: str | int, *, role: Role, device: Any = 0) -> Self:  # type: ignore[override]
        """Join as a peer that works on `device`.

        The consumer allocates the slots of a device ring; it is the only one that ring will ever have. A
        producer finds them when it first reserves.
        """
        ordinal = device_ordinal(device)
        on = _ring.Device(ordinal)  # without one nothing is to show in the ring
        native = _ring.Ring.attach(source, role=role, many_consumers=cls._many_consumers, max_spin_us=_MAX_SPIN_US)
        ring = cls(native, is_peer=True)
        try:
            ring._stage = _ring.Stage(native, on)
        except BaseException:
            native.close()
            raise
        ring.device = ordinal
        ring._finalizer = weakref.finalize(ring, _close, ring._stage, ring._native, 10.0, 1.0)
        return ring

    @property
    def in_device_memory(self) -> bool:
        return self._native.in_device_memory

    def reserve(self, ticket: int | None = None, *, timeout_s: float = 30.0, stream: Any = None) -> CudaWriteSlot:
        """As HiddenRing.reserve. What is enqueued on `stream` until commit belongs to the record."""
        stage = self._attached()
        return CudaWriteSlot(stage.reserve(ticket, timeout_s, stream_handle(stream, self.device)), self)

    def put(
        self,
        tensor: Any,
        ticket: int | None = None,
        *,
        microbatch_id: int = 0,
        tag: int = 0,
        timeout_s: float = 30.0,
        stream: Any = None,
    ) -> None:
        """Producer: hand over a copy of a whole tensor, or array with __cuda_array_interface__, in one native call.

        The copy is enqueued on `stream`, and the tensor must stay as it is until that has passed. Raises as reserve
        does; ValueError, TypeError or TransportError, and the ticket stays as it was, when the tensor cannot be sent.
        """
        array = describe_array(tensor, self.device)
        handle = stream_handle(stream, self.device)
        self._attached().put(ticket, timeout_s, handle, *array.dtype, array.shape, array.address, microbatch_id, tag)

    def receive(self, ticket: int | None = None, *, timeout_s: float = 30.0, stream: Any = None) -> CudaReadSlot:
        """As HiddenRing.receive. The slot is free when what is enqueued on `stream` until release is done."""
        stage = self._attached()
        return CudaReadSlot(stage.receive(ticket, timeout_s, stream_handle(stream, self.device)), self)

    def try_receive(self, ticket: int | None = None, *, stream: Any = None) -> CudaReadSlot | None:
        """As receive, without waiting."""
        stage = self._attached()
        self._native.clear_ready()
        lease = stage.try_receive(ticket, stream_handle(stream, self.device))
        return None if lease is None else CudaReadSlot(lease, self)

    def is_free(self, ticket: int) -> bool:
        """May this ticket be granted? True when its slot is free for it, its last reader's stream included."""
        return self._native.is_free(ticket)

    def reclaim(self, ticket: int) -> None:
        """Consumer: make an abandoned or aborted ticket free, to be granted again."""
        self._native.reclaim(ticket)

    def synchronize(self, *, timeout_s: float = 30.0) -> None:
        """Wait until everything committed or released here has come to pass; TransportError if some of it failed."""
        self._attached().drain(timeout_s)

    def close(self, *, timeout_s: float = 30.0, grace_s: float = 5.0) -> None:
        """Wait for what was committed and released, give the rest back, leave, and free the GPU's memory.

        A consumer waits `grace_s` for its producers to close first. RingTimeout, and nothing is closed, when
        streams are still busy after `timeout_s`.
        """
        if hasattr(self, "_finalizer"):
            if not self._finalizer.alive:
                return
            _close(self._stage, self._native, timeout_s, grace_s)
            self._finalizer.detach()
        else:
            self._native.close()

    def _attached(self) -> _ring.Stage:
        try:
            return self._stage
        except AttributeError:
            raise TransportError(f"{self.name}: created but not attached; attach() with a role first") from None


def _close(stage: _ring.Stage, native: _ring.Ring, timeout_s: float, grace_s: float) -> None:
    if not stage.close(timeout_s, grace_s):
        warnings.warn(
            f"{native.name}: a producer is still attached {grace_s} s after its consumer closed; the device memory "
            "stays allocated until this process ends. Close producers when they see PeerDied",
            ResourceWarning,
            stacklevel=3,
        )
    native.close()
