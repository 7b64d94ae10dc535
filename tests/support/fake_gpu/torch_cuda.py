"""torch.cuda over the devices of device.cpp, for this process. Loads torch."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

# Before torch and for all that come after: the symbols that it defines in torch's place must be found first.
_flags = sys.getdlopenflags()
sys.setdlopenflags(_flags | os.RTLD_GLOBAL)
import fake_device  # noqa: E402

sys.setdlopenflags(_flags)

import torch  # noqa: E402
import torch.cuda  # noqa: E402
import torch.distributed as dist  # noqa: E402


class Stream:
    """The default stream: all of them are."""

    cuda_stream = stream_id = 0
    device_type = 1

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device_index = _index(device)
        self.device = torch.device("cuda", self.device_index)

    def synchronize(self) -> None:
        fake_device.synchronize()

    def wait_stream(self, stream: Stream) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        event.synchronize()

    def query(self) -> bool:
        return True

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.device == self.device

    def __hash__(self) -> int:
        return self.device_index


class Event(torch.Event):
    """When it is recorded, what came before it is over. Torch's own streams take it, too."""

    _at: float | None = None

    def __new__(cls, *_: Any, **__: Any) -> Event:
        return super().__new__(cls, torch.device("cuda"))

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self._timed = enable_timing

    def record(self, stream: Stream | None = None) -> None:
        fake_device.synchronize()
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        assert self._at is not None, "an event that was not recorded is waited for"

    def wait(self, stream: Stream | None = None) -> None:
        self.synchronize()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        assert self._timed
        assert end._timed
        return (end._at - self._at) * 1e3  # type: ignore[operator]


class DeviceContext:
    def __init__(self, device: Any) -> None:
        self._device = _index(device)

    def __enter__(self) -> None:
        self._before = fake_device.current_device()
        fake_device.set_device(self._device)

    def __exit__(self, *_: object) -> None:
        fake_device.set_device(self._before)


def _index(device: Any) -> int:
    if isinstance(device, int):
        return device if device >= 0 else fake_device.current_device()
    index = None if device is None else torch.device(device).index
    return fake_device.current_device() if index is None else index


def _resize_storage(self: torch.UntypedStorage, nbytes: int) -> torch.UntypedStorage:
    if self.device.type != "cuda":
        return _resize_of_host(self, nbytes)
    fake_device.resize_storage(self._cdata, nbytes)
    return self


def _init_process_group(backend: str | None = None, *args: Any, **options: Any) -> None:
    _init_of_torch(backend and backend.replace("nccl", "fake_nccl"), *args, **options)


def _make_nccl(store: Any, rank: int, size: int, timeout: Any) -> Any:
    return fake_device.make_nccl(dist.ProcessGroupGloo(store, rank, size, timeout), rank, size)


def _histc(self: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    """CUDA's operator counts integers, too; the CPU's does not."""
    if self.device.type != "cuda" or self.is_floating_point():
        return _histc_of_torch(self, *args, **options)
    return _histc_of_torch(self.float(), *args, **options).to(self.dtype)


PROPERTIES = SimpleNamespace(
    name="fake",
    major=9,
    minor=0,
    multi_processor_count=4,
    total_memory=4 << 30,
)
PATCHES = {
    "_lazy_init": lambda: None,
    "is_initialized": lambda: True,
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "is_current_stream_capturing": lambda: False,
    "device_count": fake_device.device_count,
    "current_device": fake_device.current_device,
    "set_device": lambda device: fake_device.set_device(_index(device)),
    "device": DeviceContext,
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "synchronize": lambda device=None: fake_device.synchronize(),
    "Stream": Stream,
    "Event": Event,
    "current_stream": Stream,
    "default_stream": Stream,
    "stream": lambda stream: contextlib.nullcontext(),
    "empty_cache": lambda: None,
    "memory_allocated": lambda device=None: fake_device.allocated(_index(device)),
    "max_memory_allocated": lambda device=None: fake_device.peak(_index(device)),
    "reset_peak_memory_stats": lambda device=None: fake_device.reset_peak(_index(device)),
    "mem_get_info": lambda device=None: (PROPERTIES.total_memory - fake_device.allocated(_index(device)), 4 << 30),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    "manual_seed_all": lambda seed: None,
    "cudart": lambda: SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: 0,
        cudaHostUnregister=lambda address: 0,
        cudaError=SimpleNamespace(success=0),
    ),
}

fake_device.start()
import flash  # noqa: E402, F401

for name, replacement in PATCHES.items():
    setattr(torch.cuda, name, replacement)
torch._C._cuda_getCurrentRawStream = lambda device: 0
torch.Tensor.record_stream = lambda self, stream: None
torch.Tensor.is_pinned = lambda self, device=None: True
_histc_of_torch = torch.histc
torch.histc = _histc
_resize_of_host = torch.UntypedStorage.resize_
torch.UntypedStorage.resize_ = _resize_storage
_init_of_torch = dist.init_process_group
dist.init_process_group = _init_process_group
dist.Backend.register_backend("fake_nccl", _make_nccl, devices=["cuda"])
