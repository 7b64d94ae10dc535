"""The recorders of a run, as its `profile` section asks for them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from kdflow.config import ProfileConfig
from kdflow.tracing.device import DeviceSpans
from kdflow.tracing.spans import GPU, HOST, HostSpans, SpanFile
from kdflow.tracing.torch_profile import TorchProfile
from kdflow.tracing.trace import OFF, Recorder, Trace

FOLDER = "profile"  # in the run's
VARIABLE = "KDFLOW_TRACE"  # of the environment, for share_trace


def open_trace(
    config: ProfileConfig,
    folder: Path,
    role: str,
    index: int,
    device: torch.device,
    *,
    host_is_ahead: bool,
    part: str | None = None,
) -> Trace:
    """The trace of one process of a run.

    Args:
        folder: of the run.
        role: student, teacher.
        index: of this process among those of its role.
        host_is_ahead: it queues work on a GPU without waiting, so that the GPU has times of its own.
        part: of that process, where this is another one below it.
    """
    recorders: list[Recorder] = []
    on_gpu = device.type == "cuda"
    pieces = folder / FOLDER / "spans"
    suffix = f"-{part}" if part else ""
    # A teacher that was started again writes beside what the first one left.
    stem = f"{role}-{index}-{os.getpid()}{suffix}"
    if config.timeline:
        pieces.mkdir(parents=True, exist_ok=True)
        recorders.append(HostSpans(SpanFile(pieces / f"{stem}.jsonl", role, index, part or HOST)))
        if on_gpu and host_is_ahead:
            recorders.append(DeviceSpans(SpanFile(pieces / f"{stem}-gpu.jsonl", role, index, GPU), device))
    if config.num_steps:
        (folder / FOLDER).mkdir(exist_ok=True)
        path = folder / FOLDER / f"torch-{role}-{index}{suffix}.json"
        recorders.append(TorchProfile(path, first_step=config.first_step, num_steps=config.num_steps))
    if on_gpu and recorders:
        recorders.append(_NvtxRanges())
    return Trace(recorders)


def share_trace(config: ProfileConfig, folder: Path, role: str, index: int) -> None:
    """Tells processes that this one will start whose part they are; they call open_shared_trace."""
    os.environ[VARIABLE] = json.dumps([asdict(config), str(folder.resolve()), role, index])


def open_shared_trace(part: str, device: torch.device) -> Trace:
    """The trace of a process whose work, queued ahead of `device`, is a part of that of one above it.

    Where none above it called share_trace, it keeps nothing.
    """
    if VARIABLE not in os.environ:
        return OFF
    config, folder, role, index = json.loads(os.environ[VARIABLE])
    return open_trace(ProfileConfig(**config), Path(folder), role, index, device, host_is_ahead=True, part=part)


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
