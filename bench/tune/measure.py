"""What all parts of the tuning share: inputs, a line for each thing measured, and what becomes of one that fails."""

from __future__ import annotations

import faulthandler
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TextIO

import torch

from kdflow_kernels import get_divergence
from kdflow_kernels.problem import Head, Problem

RECORDS: list[TextIO] = []  # the file of --out, if any
# What one line may take, its compilation with it. A kernel that waits for ever ends the part with a traceback.
LINE_S = 60.0
LOST = 3  # the exit code of a part whose context on the device is lost


def median_ms(step: Callable[[], object], *, repetitions: int = 7) -> float:
    for _ in range(2):
        step()
    times = []
    for _ in range(repetitions):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return sorted(times)[len(times) // 2]


def say(part: str, name: str, ms: float, **figures: float) -> None:
    record({"part": part, "name": name, "ms": ms, **figures})
    rest = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"{part:8} {name:58} {ms:9.3f} ms  {rest}", flush=True)


def tell(part: str, name: str, words: str, **figures: object) -> None:
    """What is no time."""
    record({"part": part, "name": name, "words": words, **figures})
    print(f"{part:8} {name}: {words}", flush=True)


def record(found: dict[str, object]) -> None:
    for file in RECORDS:
        print(json.dumps(found), file=file, flush=True)


def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(std).to(dtype)


class Shape:
    def __init__(self, text: str) -> None:
        self.N, self.V, self.Hs, self.Ht = (int(part) for part in text.split(","))
        self.h, self.w = normal(self.N, self.Hs), normal(self.V, self.Hs, std=2 * self.Hs**-0.5)
        self.ht, self.wt = normal(self.N, self.Ht), normal(self.V, self.Ht, std=2 * self.Ht**-0.5)


def problem(s: Shape, divergence: str, rows: int) -> Problem:
    return Problem(
        student=Head(s.h[:rows], s.w, None, 1.0, None, None),
        teacher=Head(s.ht[:rows], s.wt, None, 1.0, None, None),
        labels=None,
        row_scale=torch.full((rows,), 1.0 / rows, device="cuda"),
        num_compared=s.V,
        divergence=get_divergence(divergence),
        temperature=1.0,
        kd_weight=1.0,
        ce_weight=0.0,
        chunk_size=rows,
        grad_filter_eps=0.0,
    )


@contextmanager
def line(part: str, name: str) -> Iterator[None]:
    """One variant that cannot run is one line of the table; one that leaves no device to go on with ends the part."""
    faulthandler.dump_traceback_later(LINE_S, exit=True)
    try:
        yield
    except Exception as error:
        tell(part, name, f"{type(error).__name__}: {str(error)[:300]}")
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            tell(part, name, f"nothing can run in this process any more: {str(lost)[:200]}")
            raise SystemExit(LOST) from lost
    finally:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def constants(module: ModuleType, **values: object) -> Iterator[None]:
    """Of a module, for a while."""
    before = {key: getattr(module, key) for key in values}
    for key, value in values.items():
        setattr(module, key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(module, key, value)
