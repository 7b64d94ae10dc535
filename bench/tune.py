"""``python -m bench.tune``: the parts of the fused loss on a GPU, each beside what the hardware allows.

Times the products whole and in groups, the row kernels in their layouts, and the loss as it comes out of them: what the
constants of ``kdflow_kernels.triton_backend`` were chosen by. Prints a line for each; times are medians. A variant of
the whole loss is timed in turn with the loss as it comes, and what counts is their ratio: clocks drift by more than
most variants gain. Rows in clusters come last, and are compared with the Triton kernel before they are timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TextIO

import torch

from kdflow_kernels import cluster_rows, fused_kd_loss, get_divergence, nvrtc, triton_backend
from kdflow_kernels.cpp_divergences import cpp_twin
from kdflow_kernels.problem import GradientNeeds, Head, Problem, RowTerms

PARTS = ("gemms", "rows", "loss", "clusters")
RECORDS: list[TextIO] = []  # the file of --out, if any
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
    for file in RECORDS:
        print(json.dumps({"part": part, "name": name, "ms": ms, **figures}), file=file, flush=True)
    rest = "  ".join(f"{key} {value:.4g}" for key, value in figures.items())
    print(f"{part:8} {name:58} {ms:9.3f} ms  {rest}", flush=True)


def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(std).to(dtype)


class Shape:
    def __init__(self, text: str) -> None:
        self.N, self.V, self.Hs, self.Ht = (int(part) for part in text.split(","))
        self.h, self.w = normal(self.N, self.Hs), normal(self.V, self.Hs, std=2 * self.Hs**-0.5)
        self.ht, self.wt = normal(self.N, self.Ht), normal(self.V, self.Ht, std=2 * self.Ht**-0.5)


def gemms(s: Shape) -> None:
    """The four products over all rows at once, which are the floor, and in groups."""
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
    for lanes, warps, programs in layouts:
        name = f"{divergence} {'fp32' if fp32 else 'bf16'} lanes {lanes} warps {warps} programs {programs}"
        name += f" kept 1/{triton_backend.KEPT_SHARE}" if triton_backend.KEPT_SHARE else " kept as it comes"
        changed = {"LANES": lanes, "NUM_WARPS": warps, "PROGRAMS_PER_PROCESSOR": programs, "_fp32_logits": fp32}
        with constants(triton_backend, **changed), told_errors("rows", name):
            Rows(s, divergence, rows).time(name)


def cluster_kernel(s: Shape, *, divergence: str, rows: int) -> None:
    """The kernel for clusters: as it is laid out, with other numbers of rows, and in other cuts."""
    with constants(triton_backend, CLUSTER_ROWS=True):
        name = f"{divergence} bf16 clusters"
        with told_errors("rows", name):
            Rows(s, divergence, rows).compare_with_triton(name)
        for count in (cluster_rows.ROWS_PER_CLUSTER, *ROWS_PER_CLUSTER):
            with constants(cluster_rows, ROWS_PER_CLUSTER=count), told_errors("rows", name):
                Rows(s, divergence, rows).time(f"{name} of {count} rows")
        for given in CUTS:
            found = cluster_rows.layout(s.V) if given is None else cluster_rows.cut(s.V, *given)
            assert found is not None
            name = f"{divergence} bf16 cluster {found.cluster} threads {found.threads}"
            name += f" blocks {found.blocks_per_processor}"
            with constants(cluster_rows, layout=lambda *_, found=found: found), told_errors("rows", name):
                print(f"rows     {name}: {of_function(found, divergence)}", flush=True)
                Rows(s, divergence, rows).time(name)


def of_function(found: cluster_rows.Layout, divergence: str) -> str:
    """What the driver says of a form of the kernel: registers, what it spills, and how many clusters run at once."""
    options = {"HAS_LABELS": False, "OWN_CE": False, "FORM_GRADIENT": True}
    major, minor = torch.cuda.get_device_capability()
    twin = cpp_twin(get_divergence(divergence))
    assert twin is not None
    cubin = cluster_rows.compile_form(found, twin[0], options, architecture=10 * major + minor)
    large = found.cluster > cluster_rows.PORTABLE_CLUSTER
    function = nvrtc.Function(cubin, "cluster_rows", shared_bytes=found.shared_bytes, large_cluster=large)
    return ", ".join(f"{name} {value}" for name, value in function.figures(found.cluster, found.threads).items())


class Rows:
    """A chunk of the loss whose logits are there: its row kernel, whichever it is."""

    def __init__(self, s: Shape, divergence: str, rows: int) -> None:
        rows = min(rows, s.N)
        self.chunk = slice(0, rows)
        run = triton_backend._Run(problem(s, divergence, rows), GradientNeeds(True, True, False))
        run._allocate()
        torch.manual_seed(0)
        run.student_logits[:, : s.V].normal_(std=2)
        run.teacher_logits[:, : s.V].normal_(std=2)
        self.run, self.out = run, torch.zeros((rows, run.padded), dtype=torch.bfloat16, device="cuda")
        # What must move: both logits read once, the gradient written once.
        self.num_bytes = rows * s.V * (2 * run.logits_dtype.itemsize + 2)

    def launch(self) -> RowTerms:
        terms = RowTerms.empty(self.run.problem, torch.float32)
        self.run.launcher.launch(self.chunk, self.run.student_logits, self.run.teacher_logits, self.out, terms)
        return terms

    def time(self, name: str) -> None:
        begun = time.perf_counter()
        terms = self.launch()
        torch.cuda.synchronize()
        compile_s = time.perf_counter() - begun
        run, out = self.run, self.out

        def launches() -> None:
            for _ in range(8):  # so that the host's part of a launch is hidden
                run.launcher.launch(self.chunk, run.student_logits, run.teacher_logits, out, terms)

        ms = median_ms(launches) / 8
        say("rows", name, ms, GBs=self.num_bytes / ms / 1e6, compile_s=compile_s)

    def compare_with_triton(self, name: str) -> None:
        """What is wrong is not worth timing: raises where gradient or terms differ by more than their rounding."""
        terms, out = self.launch(), self.out.clone()
        with constants(triton_backend, CLUSTER_ROWS=False):
            self.run.launcher = self.run._launcher()
        expected = self.launch()
        worst = {"gradient": float((out.float() - self.out.float()).abs().max() / self.out.float().abs().max())}
        for field in ("kd", "student_entropy", "teacher_entropy"):
            ours, theirs = getattr(terms, field), getattr(expected, field)
            worst[field] = float(((ours - theirs).abs() / theirs.abs().clamp(min=1e-3)).max())
        differing = int((terms.top1_agreement != expected.top1_agreement).sum())
        figures = ", ".join(f"{key} {value:.2g}" for key, value in worst.items())
        print(f"rows     {name} against Triton's, relative: {figures}; {differing} agreements differ", flush=True)
        if worst["gradient"] > 2**-7 or max(worst.values()) > 0.01 or differing:
            raise RuntimeError("these differ by more than their rounding")


@contextmanager
def told_errors(part: str, name: str) -> Iterator[None]:
    """One variant that cannot run is one line of the table."""
    try:
        yield
    except Exception as error:
        print(f"{part:8} {name}: {type(error).__name__}: {str(error)[:200]}", flush=True)


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


def whole_loss(s: Shape, name: str, divergence: str = "forward_kl", **changed: object) -> None:
    """The loss with other constants, in turn with the loss as it comes, which counts as 100%."""
    h, w = s.h.clone().requires_grad_(), s.w.clone().requires_grad_()

    def steps() -> None:  # several in a row, as in a training loop, where the host is ahead
        for _ in range(2):
            h.grad = w.grad = None
            fused_kd_loss(h, w, s.ht, s.wt, divergence=divergence).loss.backward()

    def timed() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        steps()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 2

    with told_errors("loss", f"{name} {divergence}"):
        times, ratios = [], []
        for _ in range(9):
            plain = timed()
            with constants(triton_backend, **changed):
                times.append(timed())
            ratios.append(times[-1] / plain)
        h.grad = w.grad = None
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        with constants(triton_backend, **changed):
            steps()
        peak = (torch.cuda.max_memory_allocated() - held - h.nbytes - w.nbytes) / 2**20
        ms, ratio = sorted(times[1:])[4], sorted(ratios[1:])[4]  # the first round warmed up
        say("loss", f"{name} {divergence}", ms, percent_of_plain=100 * ratio, peak_mib=peak)


def time_rows(s: Shape, *, layouts: bool) -> None:
    if layouts:
        shapes = [(512, 8, 4), (512, 8, 2), (256, 8, 4), (256, 8, 8), (512, 16, 2), (1024, 16, 1), (1024, 32, 1)]
        for fp32, divergence in itertools.product((False, True), ("forward_kl", "jsd")):
            row_kernel(s, fp32=fp32, divergence=divergence, layouts=shapes)
    layout = (triton_backend.LANES, triton_backend.NUM_WARPS, triton_backend.PROGRAMS_PER_PROCESSOR)
    for divergence, kept_share in itertools.product(("forward_kl", "jsd"), KEPT_SHARES):
        with constants(triton_backend, KEPT_SHARE=kept_share):
            row_kernel(s, fp32=False, divergence=divergence, layouts=[layout], rows=triton_backend.CHUNK_ROWS)


def time_losses(s: Shape) -> None:
    for divergence in ("forward_kl", "jsd", "reverse_kl"):
        whole_loss(s, "as it comes", divergence)  # how well the ratios below can be known
    for divergence, kept_share in itertools.product(("forward_kl", "jsd"), KEPT_SHARES[1:]):
        whole_loss(s, f"kept share {kept_share}", divergence, KEPT_SHARE=kept_share)
    whole_loss(s, "fp32 logits", _fp32_logits=True)
    whole_loss(s, "fp32 sums of dW", GROUPS_IN_LOW_PRECISION=0)
    whole_loss(s, "rows not staggered", STAGGER=0)
    whole_loss(s, "chunks of 512", CHUNK_ROWS=512)
    for rows in (1664, 2816, 4096):
        whole_loss(s, f"groups of {rows}", plan_groups=lambda *_, rows=rows: rows)


def time_clusters(s: Shape) -> None:
    without = cluster_rows.unavailable(torch.device("cuda", torch.cuda.current_device()))
    if without is not None:
        print(f"rows in clusters are left out: {without}", flush=True)
        return
    for divergence in ("forward_kl", "jsd", "reverse_kl"):
        cluster_kernel(s, divergence=divergence, rows=triton_backend.CHUNK_ROWS)
        whole_loss(s, "rows in clusters", divergence, CLUSTER_ROWS=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--shape", default="8192,151936,2560,2048", metavar="N,V,Hs,Ht")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)} (default: all)")
    parser.add_argument("--out", help="file for the figures as JSON lines")
    parser.add_argument("--layouts", action="store_true", help="the Triton row kernel in every layout, too")
    given = parser.parse_args()
    parts = given.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: unknown {sorted(unknown)}; known: {PARTS}")
    if not torch.cuda.is_available():
        print("bench.tune needs a CUDA device", file=sys.stderr)
        return 2
    if given.out:
        RECORDS.append(open(given.out, "w"))  # noqa: SIM115
    s = Shape(given.shape)
    if "gemms" in parts:
        gemms(s)
    if "rows" in parts:
        time_rows(s, layouts=given.layouts)
    if "loss" in parts:
        time_losses(s)
    if "clusters" in parts:
        time_clusters(s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
