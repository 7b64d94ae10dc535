"""The row kernels on a chunk whose logits are there, and the Triton one in its layouts."""

from __future__ import annotations

import itertools
import time

import torch

from bench.tune.measure import Shape, constants, line, median_ms, problem, say
from kdflow_kernels import triton_backend
from kdflow_kernels.problem import GradientNeeds, RowTerms

KEPT_SHARES = (0, 2, 4, 8)
LAUNCHES = 8  # in a row, so that the host's part of one is hidden


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
            for _ in range(LAUNCHES):
                run.launcher.launch(self.chunk, run.student_logits, run.teacher_logits, out, terms)

        ms = median_ms(launches) / LAUNCHES
        say("rows", name, ms, GBs=self.num_bytes / ms / 1e6, compile_s=compile_s)


def row_kernel(s: Shape, *, fp32: bool, divergence: str, layouts: list[tuple[int, int, int]], rows: int = 512) -> None:
    """The Triton row kernel in every layout."""
    for lanes, warps, programs in layouts:
        name = f"{divergence} {'fp32' if fp32 else 'bf16'} lanes {lanes} warps {warps} programs {programs}"
        name += f" kept 1/{triton_backend.KEPT_SHARE}" if triton_backend.KEPT_SHARE else " kept as it comes"
        changed = {"LANES": lanes, "NUM_WARPS": warps, "PROGRAMS_PER_PROCESSOR": programs, "_fp32_logits": fp32}
        with constants(triton_backend, **changed), line("rows", name):
            Rows(s, divergence, rows).time(name)


def time_rows(s: Shape) -> None:
    layout = (triton_backend.LANES, triton_backend.NUM_WARPS, triton_backend.PROGRAMS_PER_PROCESSOR)
    for divergence, kept_share in itertools.product(("forward_kl", "jsd"), KEPT_SHARES):
        with constants(triton_backend, KEPT_SHARE=kept_share):
            row_kernel(s, fp32=False, divergence=divergence, layouts=[layout], rows=triton_backend.CHUNK_ROWS)


def time_layouts(s: Shape) -> None:
    shapes = [(512, 8, 4), (512, 8, 2), (256, 8, 4), (256, 8, 8), (512, 16, 2), (1024, 16, 1), (1024, 32, 1)]
    for fp32, divergence in itertools.product((False, True), ("forward_kl", "jsd")):
        row_kernel(s, fp32=fp32, divergence=divergence, layouts=shapes)
