"""The four products of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from bench.tune.measure import Shape, line, median_ms, say


def gemms(s: Shape) -> None:
    """The four products over all rows at once, which are the floor, and in groups."""
    z = torch.empty((s.N, s.V), dtype=torch.bfloat16, device="cuda")
    grad_h, grad_w = torch.empty_like(s.h), torch.empty_like(s.w)
    total = 0.0

    def part(name: str, flops: float, step: Callable[[], object]) -> float:
        ms = math.nan
        with line("gemm", name):
            ms = median_ms(step)
            say("gemm", name, ms, TFLOPs=flops / ms / 1e9)
        return ms

    per = 2.0 * s.V
    total += part("z_s whole", per * s.N * s.Hs, lambda: torch.mm(s.h, s.w.T, out=z))
    total += part("z_t whole", per * s.N * s.Ht, lambda: torch.mm(s.ht, s.wt.T, out=z))
    total += part("dH whole", per * s.N * s.Hs, lambda: torch.mm(z, s.w, out=grad_h))
    total += part("dW whole", per * s.N * s.Hs, lambda: torch.mm(z.T, s.h, out=grad_w))

    def four() -> None:
        torch.mm(s.h, s.w.T, out=z)
        torch.mm(s.ht, s.wt.T, out=z)
        torch.mm(z, s.w, out=grad_h)
        torch.mm(z.T, s.h, out=grad_w)

    together = median_ms(four)
    say("gemm", "FLOOR: the four in a row", together, sum=total, TFLOPs=per * s.N * (3 * s.Hs + s.Ht) / together / 1e9)
    for rows in (512, 1024, 2048):
        part(f"z_s of {rows} rows", per * rows * s.Hs, lambda n=rows: torch.mm(s.h[:n], s.w.T, out=z[:n]))
        part(f"z_t of {rows} rows", per * rows * s.Ht, lambda n=rows: torch.mm(s.ht[:n], s.wt.T, out=z[:n]))
    padded = torch.empty((2048, -(-s.V // 4096) * 4096), dtype=torch.bfloat16, device="cuda")[:, : s.V]
    part("z_s of 2048 rows, padded rows", per * 2048 * s.Hs, lambda: torch.mm(s.h[:2048], s.w.T, out=padded))
    wide = torch.empty((1024, s.V), dtype=torch.float32, device="cuda")
    for rows in (512, 1024):
        part(
            f"z_s of {rows} rows into fp32",
            per * rows * s.Hs,
            lambda n=rows: torch.mm(s.h[:n], s.w.T, out_dtype=torch.float32, out=wide[:n]),
        )
    for rows in (1024, 1280, 1664, 2048, 3328, 4096):
        part(f"dH of {rows} rows", per * rows * s.Hs, lambda n=rows: torch.mm(z[:n], s.w, out=grad_h[:n]))
    for rows in (1024, 1664, 2048):
        part(f"dW += of {rows} rows", per * rows * s.Hs, lambda n=rows: grad_w.addmm_(z[:n].T, s.h[:n]))
        part(f"dW = of {rows} rows", per * rows * s.Hs, lambda n=rows: torch.mm(z[:n].T, s.h[:n], out=grad_w))
    fp32 = torch.zeros_like(grad_w, dtype=torch.float32)
    part(
        "dW += of 2048 rows into fp32",
        per * 2048 * s.Hs,
        lambda: torch.addmm(fp32, z[:2048].T, s.h[:2048], out_dtype=torch.float32, out=fp32),
    )
