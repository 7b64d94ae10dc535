"""The driver of fake_cuda.cpp from Python, and tests that run on it in a process of their own.

A process loads one driver for good, so a test of the fake can not run in the process of pytest, where a real
one may be in use.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kdflow.transport import CudaRing
from support.processes import Spawned

NUM_SLOTS = 2
SLOT_BYTES = 4096
PLACEMENTS = ("device", "pinned")
NOTHING = dict.fromkeys(("allocations", "opened", "registered", "events", "contexts"), 0)
NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 6)

SOURCE = Path(__file__).with_name("fake_cuda.cpp")


def build(folder: Path) -> Path:
    """Compile the fake driver into `folder`."""
    library = folder / "libfakecuda.so"
    options = ["-std=c++20", "-O1", "-g", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["g++", *options, str(SOURCE), "-o", str(library), "-lpthread"], check=True, timeout=120)
    return library


def on_fake_driver(test: Callable[[], None]) -> Callable[[dict[str, str]], None]:
    """The test runs in a process of its own, with the fake driver."""

    @functools.wraps(test)
    def run(fake_driver: dict[str, str]) -> None:
        body = f"{test.__module__}:{test.__name__}"
        assert Spawned(_run_body, body, env=fake_driver).join() == 0

    del run.__wrapped__  # pytest would look for the body's fixtures
    run.body = test  # type: ignore[attr-defined]
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("fake_driver", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    )
    return run


def _run_body(body: str) -> None:
    import importlib

    module, _, name = body.partition(":")
    getattr(importlib.import_module(module), name).body()


class FakeArray:
    """Memory of a fake device; `numpy` looks into it."""

    def __init__(self, values: np.ndarray, device: int = 0) -> None:
        library = _library()
        values = np.ascontiguousarray(values)
        context, pointer = ctypes.c_void_p(), ctypes.c_uint64()
        assert library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0
        assert library.cuCtxPushCurrent_v2(context) == 0
        assert library.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(max(1, values.nbytes))) == 0
        assert library.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
        assert library.cuDevicePrimaryCtxRelease_v2(device) == 0
        self.numpy = look_at(pointer.value, values.dtype, values.shape)
        self.numpy[...] = values
        self.__cuda_array_interface__ = {
            "version": 3,
            "shape": values.shape,
            "typestr": values.dtype.str,
            "data": (pointer.value, False),
        }

    @property
    def address(self) -> int:
        return self.__cuda_array_interface__["data"][0]

    def free(self) -> None:
        assert _library().cuMemFree_v2(ctypes.c_uint64(self.address)) == 0


def look_at(address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Host memory by its address."""
    dtype = np.dtype(dtype)
    size = dtype.itemsize * int(np.prod(shape))
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class FakeStream:
    """A stream that a test can hold, so that nothing on it runs. `cuda_stream` is torch's name for the handle."""

    def __init__(self, device: int = 0) -> None:
        library = _library()
        library.fake_stream.restype = ctypes.c_void_p
        self.cuda_stream: int = library.fake_stream(device)

    def hold(self) -> None:
        _library().fake_hold(ctypes.c_void_p(self.cuda_stream), 1)

    def let_go(self) -> None:
        _library().fake_hold(ctypes.c_void_p(self.cuda_stream), 0)

    def synchronize(self) -> None:
        _library().fake_synchronize(ctypes.c_void_p(self.cuda_stream))


def fail(call: str, result: int, *, passing: int = 0) -> None:
    """The driver's call returns `result` after `passing` more calls; 0 makes it work again."""
    _library().fake_fail(call.encode(), result, passing)


def live() -> dict[str, int]:
    """How many things of each kind exist."""
    kinds = ("allocations", "opened", "registered", "events", "contexts")
    return {kind: _library().fake_live(kind.encode()) for kind in kinds}


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(os.environ["KDFLOW_CUDA_DRIVER"])


@contextmanager
def ring_pair(placement: str, *, devices: tuple[int, int] = (0, 0)) -> Iterator[tuple[CudaRing, CudaRing]]:
    """A producer and a consumer in this process, on these devices."""
    with CudaRing.create(name="hidden[0]", num_slots=NUM_SLOTS, slot_bytes=SLOT_BYTES, placement=placement) as made:
        producer = CudaRing.attach(made.handle, role="producer", device=devices[0])
        consumer = CudaRing.attach(made.handle, role="consumer", device=devices[1])
        try:
            yield producer, consumer
        finally:
            producer.close()
            consumer.close()


def received(consumer: CudaRing, ticket: int) -> np.ndarray:
    """The record, copied out of the slot on the default stream."""
    with consumer.receive(ticket, timeout_s=30) as slot:
        target = FakeArray(np.zeros(slot.shape, np.float32), consumer.device)
        slot.copy_to(target)
    consumer.synchronize()
    return target.numpy
