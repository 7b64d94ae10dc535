"""Providers for the tests of the harness: small, but run in real worker processes."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Mapping
from typing import Any

from bench.model import Trial, UnavailableError

Params = Mapping[str, Any]


def sleeps(params: Params) -> Trial:
    return Trial(lambda: time.sleep(params["seconds"]), check=lambda: {"answer": 42.0}, note="sleeper")


def sleeps_twice_as_long(params: Params) -> Trial:
    return Trial(lambda: time.sleep(2 * params["seconds"]), check=lambda: {"answer": 42.0})


def touches_memory(params: Params) -> Trial:
    """Touches 64 MiB and gives it back, and keeps 8 MiB from its first step on."""
    kept: list[bytearray] = []

    def step() -> None:
        if not kept:
            kept.append(bytearray(b"x" * 8 * 2**20))
        with mmap.mmap(-1, 64 * 2**20) as memory:
            for offset in range(0, len(memory), mmap.PAGESIZE):
                memory[offset] = 1

    return Trial(step, gradient_bytes=16 * 2**20)


def measures_itself(params: Params) -> Trial:
    """Says its own time, work and peak, and one measure more; answers need ``prepare`` before."""
    ready = [False]

    def prepare() -> None:
        ready[0] = True

    def step() -> dict[str, float]:
        assert ready[0], "prepare did not run"
        ready[0] = False
        return {"seconds": 0.5, "work": 100.0, "peak_mib": 3.0, "p99_us": 7.0}

    return Trial(step, prepare=prepare)


def unavailable(params: Params) -> Trial:
    raise UnavailableError("needs a machine from next year")


def prints_and_raises(params: Params) -> Trial:
    print("this must not reach the answers")

    def step() -> None:
        raise RuntimeError("cannot read /some/private/folder/weights.bin")

    return Trial(step)


def dies(params: Params) -> Trial:
    return Trial(lambda: os._exit(7))


def hangs(params: Params) -> Trial:
    return Trial(lambda: time.sleep(3600))


def tells_its_process(params: Params) -> Trial:
    return Trial(lambda: None, check=lambda: {"pid": float(os.getpid())}, note=str(params["seconds"]))
