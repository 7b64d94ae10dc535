"""Is there a GPU to use, which ring suits two devices, and the handles of other people's streams and arrays.

Imports no torch and no cupy: it looks at what it is given.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from kdflow import _ring
from kdflow.transport.slots import DTYPES, address_of, dtype_code

RingKind = Literal["device", "pinned", "host"]


def cuda_unavailable_reason() -> str | None:
    """None when a CUDA device can be used, else why not. Creates no context.

    It initialises the driver, as torch.cuda.is_available() does: start processes that use CUDA with spawn,
    not fork, from then on.
    """
    return _ring.cuda_unavailable_reason()


def cuda_available() -> bool:
    """Whether this process can use a CUDA device."""
    return cuda_unavailable_reason() is None


@dataclass(frozen=True)
class RingChoice:
    """Which ring to use, and why, in a sentence for people."""

    kind: RingKind
    reason: str


def choose_ring(*, producer: int | None, consumer: int | None) -> RingChoice:
    """What `auto` means for a teacher on GPU `producer` and a student on GPU `consumer`; None is the CPU.

    Both numbers as this process counts devices.
    """
    if producer is None and consumer is None:
        return RingChoice("host", "both sides compute on the CPU")
    if (missing := cuda_unavailable_reason()) is not None:
        return RingChoice("host", f"no CUDA device can be used: {missing}")
    for side, device in (("producer", producer), ("consumer", consumer)):
        if device is not None and not 0 <= device < _ring.cuda_device_count():
            raise ValueError(f"{side}: expected a device in 0..{_ring.cuda_device_count() - 1}, got {device}")
    if producer is None or consumer is None:
        cpu = "producer" if producer is None else "consumer"
        return RingChoice("pinned", f"the {cpu} computes on the CPU, so the slots are host memory")
    if producer == consumer:
        return RingChoice("device", f"both sides use GPU {consumer}")
    if _ring.cuda_can_access(producer, consumer):
        return RingChoice("device", f"GPU {producer} can write into the memory of GPU {consumer}")
    return RingChoice("pinned", f"GPU {producer} cannot reach the memory of GPU {consumer}")


def device_ordinal(device: Any) -> int:
    """The number in 1, "cuda:1" or torch.device("cuda", 1); "cuda" alone is torch's current device, or 0."""
    if isinstance(device, int):
        return device
    kind, _, index = str(device).partition(":")
    if kind != "cuda" or (index and not index.isdecimal()):
        raise ValueError(f'device: expected a number, "cuda" or "cuda:N", got {device!r}')
    if index:
        return int(index)
    torch = sys.modules.get("torch")
    return torch.cuda.current_device() if torch is not None and torch.cuda.is_initialized() else 0


def stream_handle(stream: Any, ordinal: int) -> int:
    """The CUstream of a torch or cupy stream, of anything with __cuda_stream__, or of a number.

    None is torch's current stream where torch is in use, else the default stream.
    """
    if stream is None:
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return 0
        return torch._C._cuda_getCurrentRawStream(ordinal)
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "cuda_stream"):  # torch.cuda.Stream
        return stream.cuda_stream
    if hasattr(stream, "ptr"):  # cupy.cuda.Stream
        return stream.ptr
    if hasattr(stream, "__cuda_stream__"):
        return stream.__cuda_stream__()[1]
    raise TypeError(
        f"stream: expected a torch or cupy stream, an object with __cuda_stream__ or a handle, "
        f"got {type(stream).__name__}"
    )


class DeviceArray(NamedTuple):
    """Contiguous memory of somebody's array; `dtype` is DLPack's code and bits."""

    address: int
    dtype: tuple[int, int]
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype[1] // 8 * math.prod(self.shape)


_KINDS = {"b": "bool", "u": "uint", "i": "int", "f": "float", "c": "complex"}


def describe_array(source: Any, ordinal: int) -> DeviceArray:
    """Reads a torch tensor, or whatever has __cuda_array_interface__.

    Raises:
        ValueError: it is on another device as torch knows it, not contiguous, or a lazy conjugate.
        TypeError: it is neither.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        if not source.is_cuda or source.get_device() != ordinal:
            raise ValueError(
                f"tensor: expected one on cuda:{ordinal}, where this ring was attached, got {source.device}"
            )
        if not source.is_contiguous():
            raise ValueError("tensor: expected a contiguous one; call .contiguous()")
        if source.is_conj() or source.is_neg():
            raise ValueError(
                "tensor: its conjugate or negative is still to be made; call .resolve_conj().resolve_neg()"
            )
        return DeviceArray(address_of(source), dtype_code(source.dtype), source.shape)
    interface = getattr(source, "__cuda_array_interface__", None)
    if interface is None:
        raise TypeError(
            f"tensor: expected a torch tensor or an array with __cuda_array_interface__, got {type(source).__name__}"
        )
    order, kind, size = interface["typestr"][0], interface["typestr"][1], int(interface["typestr"][2:])
    if kind not in _KINDS or order == ">":
        raise ValueError(f"array: expected little-endian numbers, got typestr {interface['typestr']!r}")
    name = "bool" if kind == "b" else f"{_KINDS[kind]}{8 * size}"
    array = DeviceArray(interface["data"][0], DTYPES[name], tuple(interface["shape"]))
    if (strides := interface.get("strides")) is not None and tuple(strides) != _row_major(array):
        raise ValueError("array: expected a contiguous one in C order")
    return array


def _row_major(array: DeviceArray) -> tuple[int, ...]:
    itemsize = array.dtype[1] // 8
    return tuple(itemsize * math.prod(array.shape[dim + 1 :]) for dim in range(len(array.shape)))
