"""``python -m bench.tune``: the parts of the fused loss on a GPU, each beside what the hardware allows.

Times the products whole and in groups, the row kernel in every layout, and the loss as it comes out of them: what the
constants of ``kdflow_kernels.triton_backend`` were chosen by. Prints tables; times are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from kdflow_kernels import cluster_rows, fused_kd_loss, get_divergence, triton_backend
from kdflow_kernels.problem import GradientNeeds, Head, Problem

RECORDS: list[dict] = []
ROWS_PER_CLUSTER = (1, 2, 8, 32)
KEPT_SHARES = (0, 2, 4, 8)
# Blocks of a cluster, of a multiprocessor, threads; None: as cluster_rows.layout has it. Not every GPU takes more than
# 8 blocks in a cluster.
CUTS = [None, (8, 2, 352), (8, 2, 256), (8, 1, 992), (4, 1, 960), (16, 2, 416), (16, 4, 256), (16, 5, 192)]


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
    RECORDS.append({"part": part, "name": name, "ms": ms, **figures})
    rest = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"{part:8} {name:58} {ms:9.3f} ms  {rest}", flush=True)


def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(std).to(dtype)


class Shape:
    def __init__(self, text: str) -> None:
        self.N, self.V, self.Hs, self.Ht = (int(part) for part in text.split(","))
        self.h, self.w = normal(self.N, self.Hs), normal(self.V, self.Hs, std=2 * self.Hs**-0.5)
        self.ht, self.wt = normal(self.N, self.Ht), normal(self.V, self.Ht, std=2 * self.Ht**-0.5)


def gemms(s: Shape) -> float:
    """Floor in ms: the four products over all rows at once."""
    z = torch.empty((s.N, s.V), dtype=torch.bfloat16, device="cuda")
    grad_h, grad_w = torch.empty_like(s.h), torch.empty_like(s.w)
    total = 0.0

    def part(name: str, flops: float, step: Callable[[], object]) -> float:
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
    return together


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


def row_kernel(s: Shape, *, fp32: bool, divergence: str, layouts: list[tuple[int, int, int]], rows: int = 512) -> None:
    """The Triton row kernel in every layout."""
    triton_backend.keep_logits_in_fp32(fp32)
    for lanes, warps, programs in layouts:
        triton_backend.LANES, triton_backend.NUM_WARPS = lanes, warps
        triton_backend.PROGRAMS_PER_PROCESSOR = programs
        name = f"{divergence} {'fp32' if fp32 else 'bf16'} lanes {lanes} warps {warps} programs {programs}"
        name += f" kept 1/{triton_backend.KEPT_SHARE}" if triton_backend.KEPT_SHARE else " kept as it comes"
        time_rows(s, name, divergence, rows)


def cluster_kernel(s: Shape, *, divergence: str, cuts: list[tuple[int, int, int] | None], rows: int) -> None:
    """The kernel for clusters: blocks of a cluster, blocks of a multiprocessor, threads; None: as it is laid out."""
    before, rows_before = cluster_rows.layout, cluster_rows.ROWS_PER_CLUSTER
    for count in ROWS_PER_CLUSTER:
        cluster_rows.ROWS_PER_CLUSTER = count
        with constants(CLUSTER_ROWS=True):
            time_rows(s, f"{divergence} bf16 clusters of {count} rows", divergence, rows)
    cluster_rows.ROWS_PER_CLUSTER = rows_before
    for cut in cuts:
        if cut is not None:
            cluster_rows.layout = lambda columns, *_, cut=cut: cluster_rows.cut(columns, *cut)
        found = cluster_rows.layout(s.V)
        if found is not None:
            name = f"cluster {found.cluster} threads {found.threads} blocks {found.blocks_per_processor}"
            with constants(CLUSTER_ROWS=True):
                time_rows(s, f"{divergence} bf16 {name}", divergence, rows)
        cluster_rows.layout = before


def time_rows(s: Shape, name: str, divergence: str, rows: int) -> None:
    """Whichever kernel it is, as GB/s of what must move: both logits read once, the gradient written once."""
    chunk = slice(0, rows)
    moved = rows * s.V * (2 * (4 if triton_backend._fp32_logits else 2) + 2)
    try:
        run = triton_backend._Run(problem(s, divergence, rows), GradientNeeds(True, True, False))
        terms = run._empty_terms()
        run._allocate()
        run.student_logits[:, : s.V].normal_(std=2)
        run.teacher_logits[:, : s.V].normal_(std=2)
        out = torch.empty((rows, run.padded), dtype=torch.bfloat16, device="cuda")
        begun = time.perf_counter()
        run._launch(chunk, run.student_logits, run.teacher_logits, out, terms)
        torch.cuda.synchronize()
        compile_s = time.perf_counter() - begun

        def launches() -> None:
            for _ in range(8):  # so that the host's part of a launch is hidden
                run._launch(chunk, run.student_logits, run.teacher_logits, out, terms)

        ms = median_ms(launches) / 8
        say("rows", name, ms, GBs=moved / ms / 1e6, compile_s=compile_s)
    except Exception as error:  # one layout that cannot run is one line of the table
        print(f"rows     {name}: {type(error).__name__}: {str(error)[:150]}", flush=True)


@contextmanager
def constants(**values: object) -> Iterator[None]:
    """Of triton_backend, for a while."""
    before = {key: getattr(triton_backend, key) for key in values}
    for key, value in values.items():
        setattr(triton_backend, key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            setattr(triton_backend, key, value)


def whole_loss(s: Shape, floor_ms: float, name: str, divergence: str = "forward_kl", **changed: object) -> None:
    with constants(**changed):
        _whole_loss(s, floor_ms, name, divergence)


def _whole_loss(s: Shape, floor_ms: float, name: str, divergence: str) -> None:
    h, w = s.h.clone().requires_grad_(), s.w.clone().requires_grad_()

    def step() -> None:
        h.grad = w.grad = None
        fused_kd_loss(h, w, s.ht, s.wt, divergence=divergence).loss.backward()

    try:
        step()
        step()
        torch.cuda.synchronize()
        h.grad = w.grad = None
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step()
        peak = (torch.cuda.max_memory_allocated() - held - h.nbytes - w.nbytes) / 2**20
        ms = median_ms(step)
        # Steps in a row, as in a training loop, where the host is ahead.
        in_a_row = median_ms(lambda: [step() for _ in range(4)], repetitions=3) / 4
        say("loss", f"{name} {divergence}", ms, in_a_row=in_a_row, floor_percent=100 * floor_ms / ms, peak_mib=peak)
    except Exception as error:
        print(f"loss     {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--shape", default="8192,151936,2560,2048", metavar="N,V,Hs,Ht")
    parser.add_argument("--out", help="file for the figures as JSON lines")
    parser.add_argument("--layouts", action="store_true", help="the row kernel in every layout, too")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.tune needs a CUDA device", file=sys.stderr)
        return 2
    s = Shape(given.shape)
    floor_ms = gemms(s)
    layout = (triton_backend.LANES, triton_backend.NUM_WARPS, triton_backend.PROGRAMS_PER_PROCESSOR)
    names = ("LANES", "NUM_WARPS", "PROGRAMS_PER_PROCESSOR", "KEPT_SHARE", "_fp32_logits")
    with constants(**{name: getattr(triton_backend, name) for name in names}):
        if given.layouts:
            layouts = [(512, 8, 4), (512, 8, 2), (256, 8, 4), (256, 8, 8), (512, 16, 2), (1024, 16, 1), (1024, 32, 1)]
            for fp32, divergence in itertools.product((False, True), ("forward_kl", "jsd")):
                row_kernel(s, fp32=fp32, divergence=divergence, layouts=layouts)
        for divergence, kept_share in itertools.product(("forward_kl", "jsd"), KEPT_SHARES):
            triton_backend.KEPT_SHARE = kept_share
            row_kernel(s, fp32=False, divergence=divergence, layouts=[layout], rows=triton_backend.CHUNK_ROWS)
    without = cluster_rows.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if without is not None:
        print(f"rows in clusters are left out: {without}", flush=True)
    for divergence in ("forward_kl", "jsd", "reverse_kl") if without is None else ():
        cluster_kernel(s, divergence=divergence, cuts=CUTS, rows=triton_backend.CHUNK_ROWS)
        whole_loss(s, floor_ms, "rows in clusters", divergence, CLUSTER_ROWS=True)
    whole_loss(s, floor_ms, "as it comes")
    whole_loss(s, floor_ms, "as it comes", "jsd")
    whole_loss(s, floor_ms, "as it comes", "reverse_kl")
    for divergence, kept_share in itertools.product(("forward_kl", "jsd"), KEPT_SHARES):
        whole_loss(s, floor_ms, f"kept share {kept_share}", divergence, KEPT_SHARE=kept_share)
    whole_loss(s, floor_ms, "fp32 logits", _fp32_logits=True)
    whole_loss(s, floor_ms, "fp32 sums of dW", GROUPS_IN_LOW_PRECISION=0)
    whole_loss(s, floor_ms, "rows not staggered", STAGGER=0)
    whole_loss(s, floor_ms, "chunks of 512", CHUNK_ROWS=512)
    for rows in (1664, 2816, 4096):
        whole_loss(s, floor_ms, f"groups of {rows}", plan_groups=lambda *_, rows=rows: rows)
    if given.out:
        with open(given.out, "w") as file:
            file.writelines(json.dumps(record) + "\n" for record in RECORDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
