"""How much of a GPU's memory is in use, all processes together, sampled from outside them."""

from __future__ import annotations

import subprocess
import threading
import time

INTERVAL_S = 0.1


class GpuSampler:
    """Samples the memory in use until left; what was in use on entering is not counted.

    That is what allocators hold, CUDA contexts included, not only what tensors fill: the amount
    that a machine must have.

    Args:
        index: of the GPU, as ``nvidia-smi`` counts.
    """

    def __init__(self, index: int):
        self._index = index
        self._before = 0.0
        self._samples: list[tuple[float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> GpuSampler:
        self._before = used_mib(self._index)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def peak_until(self, moment: float) -> float:
        """The highest use up to a moment (seconds since the epoch), in MiB."""
        return max((mib - self._before for taken, mib in self._samples if taken <= moment), default=0.0)

    def _sample(self) -> None:
        while not self._stop.is_set():
            self._samples.append((time.time(), used_mib(self._index)))
            self._stop.wait(INTERVAL_S)


def used_mib(index: int) -> float:
    command = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return float(subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout)
