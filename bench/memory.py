"""Peak memory of one step, and samples of a process tree's private memory and of a GPU's.

On the host the peak is the kernel's own high-water mark of the resident set (VmHWM), reset through
``/proc/self/clear_refs`` right before the step. It sees everything that the process touches:
tensors, oneDNN's packing buffers, C++ vectors. An allocator-level count would miss the last two.
Two things would hide memory from it, and both are taken away first: free blocks that malloc keeps
(``malloc_trim``, and a fixed mmap threshold so that big blocks always come fresh from the kernel),
and dead tensors in reference cycles (a garbage collection). This changes how malloc behaves, so
the memory step runs after all timed steps and is not timed.

On CUDA it is ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self

MIB = 2**20
M_MMAP_THRESHOLD = -3  # from glibc's malloc.h


def resident_mib(field: str = "VmRSS") -> float:
    """A memory line of ``/proc/self/status`` in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no field {field}; is this Linux?")


def settle() -> None:
    """Give free memory back to the kernel, so that what is resident is in use."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # musl has neither call
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 64 * 1024)
        libc.malloc_trim(0)


def peak_of(step: Callable[[], object], *, device: str) -> float:
    """MiB that ``step`` needed at its highest point above what was held before it."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    settle()
    before = resident_mib()
    Path("/proc/self/clear_refs").write_text("5")
    step()
    return resident_mib("VmHWM") - before


def process_tree(root: int) -> list[int]:
    """``root`` and all its living descendants."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name between parentheses may hold spaces: the parent is the second field after it.
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    tree = [root]
    for pid in tree:
        tree.extend(children.get(pid, []))
    return tree


def private_mib(pids: list[int]) -> float:
    """Sum of Private_Dirty and Private_Clean over the processes (smaps_rollup), in MiB."""
    total_kib = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Private_Dirty:", "Private_Clean:")):
                    total_kib += int(line.split()[1])
    return total_kib / 1024


class Sampler:
    """Calls ``read`` (MiB) over and over in a thread until left."""

    def __init__(self, read: Callable[[], float], *, interval_s: float):
        self._read = read
        self._interval_s = interval_s
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def peak_until(self, moment: float) -> float:
        """The highest sample up to a moment (seconds since the epoch), in MiB."""
        return max((mib for taken, mib in self._samples if taken <= moment), default=0.0)

    def _sample(self) -> None:
        while not self._stop.is_set():
            start = time.monotonic()
            self._samples.append((time.time(), self._read()))
            self._stop.wait(max(0.0, self._interval_s - (time.monotonic() - start)))


class TreeSampler(Sampler):
    """Samples the private memory of a process tree until left.

    Pages that two processes share (a ring's slots, a library's code) are in nobody's private
    memory, so the sum counts nothing twice. The kernel walks page tables for each sample, some
    10 ms per GiB: more samples a second would slow down what they measure.
    """

    def __init__(self, root: int, *, interval_s: float = 0.5):
        super().__init__(lambda: private_mib(process_tree(root)), interval_s=interval_s)


class GpuSampler(Sampler):
    """Samples a GPU's memory in use, all processes together; what was in use before is not counted.

    That is what allocators hold, CUDA contexts included, not only what tensors fill: the amount
    that a machine must have. ``index`` is as torch counts; this process gets a context there.
    """

    def __init__(self, index: int):
        before = gpu_used_mib(index)
        super().__init__(lambda: gpu_used_mib(index) - before, interval_s=0.1)


def gpu_used_mib(index: int) -> float:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    return (total - free) / MIB
