"""The recorders of a run, as its `profile` section asks for them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from kdflow.config import ProfileConfig
from kdflow.tracing.device import DeviceSpans
from kdflow.tracing.spans import HostSpans, SpanFile
from kdflow.tracing.torch_profile import TorchProfile
from kdflow.tracing.trace import Recorder, Trace

FOLDER = "profile"  # in the run's


def open_trace(
    config: ProfileConfig, folder: Path, role: str, index: int, device: torch.device, *, host_is_ahead: bool
) -> Trace:
    """The trace of one process of a run.

    Args:
        folder: of the run.
        role: student, teacher.
        index: of this process among those of its role.
        host_is_ahead: it queues work on a GPU without waiting, so that the GPU has times of its own.
    """
    recorders: list[Recorder] = []
    on_gpu = device.type == "cuda"
    pieces = folder / FOLDER / "spans"
    # A teacher that was started again writes beside what the first one left.
    stem = f"{role}-{index}-{os.getpid()}"
    if config.timeline:
        pieces.mkdir(parents=True, exist_ok=True)
        recorders.append(HostSpans(SpanFile(pieces / f"{stem}.jsonl", role, index, "host")))
        if on_gpu and host_is_ahead:
            recorders.append(DeviceSpans(SpanFile(pieces / f"{stem}-gpu.jsonl", role, index, "GPU"), device))
    if config.num_steps:
        (folder / FOLDER).mkdir(exist_ok=True)
        path = folder / FOLDER / f"torch-{role}-{index}.json"
        recorders.append(TorchProfile(path, first_step=config.first_step, num_steps=config.num_steps))
    if on_gpu and recorders:
        recorders.append(_NvtxRanges())
    return Trace(recorders)


class _NvtxRanges:
    """Ranges for Nsight Systems, on the thread that opens them."""

    def begin(self, name: str, args: dict[str, int]) -> None:
        torch.cuda.nvtx.range_push(name)

    def end(self) -> None:
        torch.cuda.nvtx.range_pop()

    def end_of_step(self) -> None:
        pass

    def close(self) -> None:
        pass
