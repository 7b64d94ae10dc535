"""Runs a function on several ranks of a process group, each a process of its own but where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist


def own_device(rank: int | None = None) -> torch.device:
    """Where this rank's student is: on the CPU, or with KDFLOW_TEST_DEVICE=cuda on a GPU of its own, counted round."""
    if os.environ.get("KDFLOW_TEST_DEVICE", "cpu") == "cpu":
        return torch.device("cpu")
    if rank is None:
        rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.device("cuda", rank % torch.cuda.device_count())


def _main(rank: int, num_ranks: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    backend = "gloo"
    if own_device(rank).type == "cuda":
        torch.cuda.set_device(own_device(rank))
        backend = "cpu:gloo,cuda:nccl"
    store = dist.FileStore(str(folder / "store"), num_ranks)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120))
    try:
        torch.save(function(*args), folder / f"result-{rank}.pt")
    finally:
        dist.destroy_process_group()
    if num_ranks > 1:
        # What was asked for is on the disk. gloo's threads outlive the group, and once one of them took the process
        # down with it while the interpreter ended ("terminate called without an active exception").
        os._exit(0)


def run_on_ranks(num_ranks: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)`, a module-level function, returned on each rank, in host memory."""
    if own_device(0).type == "cuda" and torch.version.cuda is not None and num_ranks > torch.cuda.device_count():
        pytest.skip(f"needs {num_ranks} GPUs, of which there are {torch.cuda.device_count()}")
    folder.mkdir(parents=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    if num_ranks == 1:
        _main(0, 1, folder, function, args)
    else:
        torch.multiprocessing.start_processes(
            _main, (num_ranks, folder, function, args), nprocs=num_ranks, start_method="spawn"
        )
    return [
        torch.load(folder / f"result-{rank}.pt", map_location="cpu", weights_only=False) for rank in range(num_ranks)
    ]
