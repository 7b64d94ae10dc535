"""Slots of a ring that are held: by a writer, which fills its tensor, and by a reader, which looks at it."""

from __future__ import annotations

import sys
import traceback
import weakref
from collections.abc import Sequence
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kdflow import _ring
from kdflow.errors import TransportError

if TYPE_CHECKING:
    import torch
    from typing_extensions import Self

# DLPack type codes (dlpack.h, DLDataTypeCode) and bits.
DTYPES = {
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
DTYPE_NAMES = {code: name for name, code in DTYPES.items()}


@cache
def dtype_code(dtype: torch.dtype | str) -> tuple[int, int]:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    return DTYPES[name]


def is_plain(tensor: torch.Tensor) -> bool:
    """Is what lies at its address all there is to it?"""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(tensor, torch.Tensor):
        raise TypeError(f"tensor: expected a torch tensor, got {type(tensor).__name__}; use torch.as_tensor()")
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def address_of(tensor: torch.Tensor) -> int:
    """Where its elements lie. ValueError for one without memory of its own: a DTensor, a fake or a masked one."""
    address = tensor.data_ptr()
    if address == 0 and tensor.numel() > 0:
        raise ValueError(
            f"tensor: expected one with memory of its own, got a {type(tensor).__name__} without; "
            "of a DTensor use .to_local() or .full_tensor()"
        )
    return address


class Slot:
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
        tensor = self._new_tensor()
        self._tensors.append(weakref.ref(tensor))
        return tensor

    def _new_tensor(self) -> torch.Tensor:
        import torch

        dtype, shape = self._lease.dtype, self._lease.shape
        name = DTYPE_NAMES[dtype]
        if not name.startswith("float8"):
            return torch.from_dlpack(self._dlpack())
        self._lease.set_shape(*DTYPES["uint8"], list(shape))  # not every torch reads float8 from DLPack
        try:
            raw = torch.from_dlpack(self._dlpack())
        finally:
            self._lease.set_shape(*dtype, list(shape))
        return raw.view(getattr(torch, name))

    def _dlpack(self) -> Any:
        return self._lease.dlpack()

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
    has_version = not tensor.is_inference()
    tensor.data = _nothing(tensor.dtype, tensor.device)
    if has_version:
        torch.autograd.graph.increment_version(tensor)


@cache
def _nothing(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    import torch

    return torch.empty(0, dtype=dtype, device=device)


class WriteSlot(Slot):
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
        if is_plain(source):
            address = address_of(source)
            self._set_shape(source.shape, source.dtype)
            self._lease.copy_from(address, source.nbytes)
        else:
            self.tensor(source.shape, source.dtype).copy_(source)

    def _set_shape(self, shape: Sequence[int], dtype: torch.dtype | str) -> None:
        self._require_held()
        self._lease.set_shape(*dtype_code(dtype), list(shape))

    def buffer(self, nbytes: int) -> memoryview:
        """Writable bytes of the slot, for those who have no torch; the record is uint8 (nbytes,)."""
        self._require_held()
        self._lease.set_shape(*DTYPES["uint8"], [nbytes])
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
        try:
            self._revoke_views()
        finally:
            self._lease.commit()

    def abort(self, reason: str) -> None:
        """Give the slot up; the consumer gets SlotAborted with this reason."""
        try:
            self._revoke_views()
        finally:
            self._lease.abort(reason.encode(errors="replace").decode())  # file names may hold what UTF-8 has not

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._lease.held:
            return
        if exc is not None:
            self._abort_for(exc)
            return
        try:
            self.commit()
        except BaseException as error:
            if self._lease.held:
                self._abort_for(error)
            raise

    def _abort_for(self, error: BaseException) -> None:
        # Unlike str(), this gets over an error that cannot be told in words.
        self.abort("".join(traceback.format_exception_only(error)).strip())


class ReadSlot(Slot):
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

    @property
    def committed_ns(self) -> int:
        """When the record was published, as time.monotonic_ns() tells it on this machine."""
        return self._lease.committed_ns

    def release(self) -> None:
        try:
            self._revoke_views()
        finally:
            self._lease.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._lease.held:
            self.release()
