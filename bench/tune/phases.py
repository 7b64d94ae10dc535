"""Where the time of the row kernel for clusters goes: its form with a clock, KDFLOW_PHASES in cuda/cluster_rows.cu."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from kdflow_kernels import cluster_rows
from kdflow_kernels.cluster_rows import ClusterLauncher, Form

# In the kernel's order: until a cluster's blocks run; waits for the copies of a row; its statistics; waits for the
# block's other warps; what is told to other blocks, the wait for one's own stores with it; waits for other blocks; the
# pass that only sums; the gradient's; handing its stores and the next row's copies to the memory; a row's numbers.
PHASES: tuple[str, ...] = (
    "start", "copies", "statistics", "block", "tell", "cluster", "sums", "gradient", "store", "rest",
)  # fmt: skip
# What a phase waits for, or works with.
BOUND_BY = {
    "memory": ("copies", "store"),
    "barriers": ("start", "block", "tell", "cluster"),
    "arithmetic": ("statistics", "sums", "gradient", "rest"),
}


class Parameters(cluster_rows.Parameters):
    """With where the cycles go."""

    _fields_ = (("cycles", ctypes.c_void_p),)


@dataclass(frozen=True)
class Found:
    """Cycles of a row, by phase: the mean over blocks, as the first thread of each saw it."""

    cycles: Mapping[str, float]
    slowest: float  # the longest block's time over the mean of all

    @property
    def of_row(self) -> float:
        return sum(self.cycles.values())

    def share(self, *phases: str) -> float:
        return sum(self.cycles[phase] for phase in phases) / self.of_row

    def __str__(self) -> str:
        groups = ", ".join(f"{name} {self.share(*phases):.0%}" for name, phases in BOUND_BY.items())
        phases = ", ".join(f"{name} {self.share(name):.1%}" for name in PHASES if self.cycles[name])
        return f"{groups} of {self.of_row:,.0f} cycles a row ({phases}); slowest block {self.slowest:.2f} of the mean"


def with_clock(form: Form) -> Form:
    found, divergence, options = form
    return found, divergence, (*options, ("PHASES", True))


class ClockedKernel:
    """In the place of a launcher's kernel: the same numbers, and the cycles of the last launch."""

    def __init__(self, launcher: ClusterLauncher) -> None:
        self._device = launcher.row_scale.device
        self._start = cluster_rows.kernel(*with_clock(launcher.form), self._device)
        self._num_rows = 0

    def __call__(self, num_blocks: int, parameters: cluster_rows.Parameters) -> None:
        self.cycles = torch.empty((num_blocks, len(PHASES) + 1), dtype=torch.int32, device=self._device)
        self._num_rows = parameters.num_rows
        given = Parameters(cycles=self.cycles.data_ptr())
        ctypes.memmove(ctypes.addressof(given), ctypes.addressof(parameters), ctypes.sizeof(parameters))
        self._start(num_blocks, given)

    def found(self, cluster: int) -> Found:
        cycles = self.cycles.cpu().long() & 0xFFFFFFFF
        rows = self._num_rows * cluster  # each block of a cluster has a part of each row
        of_phases = dict(zip(PHASES, (cycles.sum(0) / rows).tolist(), strict=False))
        whole = cycles[:, -1].double()
        return Found(of_phases, float(whole.max() / whole.mean()))
