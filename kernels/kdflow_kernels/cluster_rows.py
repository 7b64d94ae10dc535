"""Rows in the shared memory of a cluster (cuda/cluster_rows.cu): both sides' logits are read once, whatever the divergence.

It takes the place of the row kernel for bf16 logits of plain heads with one vocabulary, on Hopper and later; ``covers``
says when. The Triton kernel serves the rest.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kdflow_kernels import nvrtc
from kdflow_kernels.cpp_divergences import cpp_twin
from kdflow_kernels.problem import GradientNeeds, Problem, RowTerms

SOURCE = Path(__file__).with_name("cuda") / "cluster_rows.cu"
WIDTH = 8  # logits of a vector
SLICE_MULTIPLE = 64  # logits of a line of the cache
# Shared memory of one of Hopper's multiprocessors, and what each block on it gives away.
SHARED_BYTES = 228 * 1024
RESERVED_BYTES = 1024
# Every GPU that has clusters takes as many blocks in one.
PORTABLE_CLUSTER = 8
# Rows that a cluster takes one after another at most, the next one on its way while the gradient of one is written.
ROWS_PER_CLUSTER = 4


@dataclass(frozen=True)
class Layout:
    """A row is a cluster of blocks of threads, each block with a slice of the columns."""

    cluster: int
    threads: int
    slice: int
    blocks_per_processor: int

    @property
    def shared_bytes(self) -> int:
        """Both sides' slices, and where the warps' and the blocks' statistics meet; see cluster_rows.cu."""
        return 4 * self.slice + 64 * (self.threads // 32 + 2 * self.cluster)


def layout(num_columns: int, shared_bytes: int = SHARED_BYTES) -> Layout | None:
    """For rows of so many columns: the smallest cluster of which two blocks fit on a multiprocessor, so that one works while
    the other waits; else one; None: there is too little shared memory for the row."""
    for blocks_per_processor in (2, 1):
        for power in range(PORTABLE_CLUSTER.bit_length()):
            made = cut(num_columns, 2**power, blocks_per_processor)
            if blocks_per_processor * (made.shared_bytes + RESERVED_BYTES) <= shared_bytes:
                return made
    return None


def cut(num_columns: int, cluster: int, blocks_per_processor: int, threads: int | None = None) -> Layout:
    """Rows of so many columns over a cluster. threads: by default whole warps with the fewest turns that do nothing, of
    equals the most."""
    columns = -(-num_columns // (cluster * SLICE_MULTIPLE)) * SLICE_MULTIPLE
    if threads is None:
        most = 1024 // blocks_per_processor // 32 * 32  # 64 registers for each
        counts = range(most, most // 2 - 1, -32)
        threads = min(counts, key=lambda count: -(-columns // WIDTH // count) * count)
    return Layout(cluster, threads, columns, blocks_per_processor)


# What the source is compiled for: a layout, the name of a divergence in divergences.hpp, and its options.
Form = tuple[Layout, str, tuple[tuple[str, bool], ...]]


class Parameters(ctypes.Structure):
    """As in cluster_rows.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("student", "teacher", "gradient")),
        *((f"{name}_stride", ctypes.c_longlong) for name in ("student", "teacher", "gradient")),
        *((name, ctypes.c_void_p) for name in ("labels", "row_scale", "kd", "ce")),
        *((name, ctypes.c_void_p) for name in ("student_entropy", "teacher_entropy", "agreement")),
        *((name, ctypes.c_int) for name in ("num_rows", "rows_per_cluster", "num_columns")),
        *((name, ctypes.c_float) for name in ("inverse_temperature", "kd_weight", "ce_weight", "parameter")),
    )


def covers(problem: Problem, needs: GradientNeeds, *, num_columns: int, logits_dtype: torch.dtype) -> bool:
    """Whether the kernel takes this problem, on a device that can (unavailable) and where a row has place (layout)."""
    student, teacher = problem.student, problem.teacher
    return (
        teacher is not None
        and logits_dtype == student.weight.dtype == teacher.weight.dtype == torch.bfloat16
        and all(head.is_plain and head.token_ids is None for head in (student, teacher))
        and problem.num_compared == num_columns
        and problem.vocab_parallel is None
        and problem.grad_filter_eps == 0.0
        and (problem.kd_weight != 0.0 or not needs)
        and cpp_twin(problem.divergence) is not None
    )


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device; None: it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, got {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"it needs clusters, compute capability 9.0; {device} has {major}.{minor}"
    return nvrtc.unavailable()


def shared_bytes(device: torch.device) -> int:
    """Shared memory of a multiprocessor; of Hopper's where there is none."""
    if device.type != "cuda":
        return SHARED_BYTES
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


class ClusterLauncher:
    """In RowLauncher's place: the same in all chunks of a problem."""

    def __init__(
        self,
        problem: Problem,
        needs: GradientNeeds,
        *,
        found: Layout,
        num_columns: int,
        num_processors: int,
        row_scale: Tensor,
    ) -> None:
        twin = cpp_twin(problem.divergence)
        assert twin is not None
        self.problem, self.num_columns, self.row_scale, self.layout = problem, num_columns, row_scale, found
        divergence, self.parameter = twin
        self.clusters_at_once = max(1, num_processors * found.blocks_per_processor // found.cluster)
        options = {
            "HAS_LABELS": problem.labels is not None,
            "OWN_CE": problem.labels is not None and problem.temperature != 1.0,
            "FORM_GRADIENT": bool(needs),
        }
        self.form: Form = (found, divergence, tuple(options.items()))
        self.kernel = kernel(*self.form, row_scale.device)

    def launch(
        self, chunk: slice, student_logits: Tensor, teacher_logits: Tensor | None, gradient: Tensor, terms: RowTerms
    ) -> None:
        """See RowLauncher.launch."""
        assert teacher_logits is not None
        assert terms.kd is not None
        problem, kd, num_rows = self.problem, terms.kd[chunk], chunk.stop - chunk.start
        of_blocks = kd.new_empty(num_rows, self.layout.cluster)
        # Few rows are for all processors rather than for few clusters.
        rows_per_cluster = min(ROWS_PER_CLUSTER, -(-num_rows // self.clusters_at_once))
        rows = {
            "labels": problem.labels,
            "row_scale": self.row_scale,
            "ce": terms.ce,
            "student_entropy": terms.student_entropy,
            "teacher_entropy": terms.teacher_entropy,
            "agreement": terms.top1_agreement,
        }
        parameters = Parameters(
            student=student_logits.data_ptr(),
            teacher=teacher_logits.data_ptr(),
            gradient=gradient.data_ptr(),
            student_stride=student_logits.stride(0),
            teacher_stride=teacher_logits.stride(0),
            gradient_stride=gradient.stride(0),
            kd=of_blocks.data_ptr(),
            num_rows=num_rows,
            rows_per_cluster=rows_per_cluster,
            num_columns=self.num_columns,
            inverse_temperature=1.0 / problem.temperature,
            kd_weight=problem.kd_weight,
            ce_weight=problem.ce_weight,
            parameter=self.parameter,
            **{name: 0 if values is None else values[chunk].data_ptr() for name, values in rows.items()},
        )
        self.kernel(-(-num_rows // rows_per_cluster) * self.layout.cluster, parameters)
        torch.sum(of_blocks, 1, out=kd)


@functools.cache
def compile_form(found: Layout, divergence: str, options: tuple[tuple[str, bool], ...], *, architecture: int) -> bytes:
    """Machine code of one form of the kernel."""
    return nvrtc.compile_cubin(SOURCE, defines(found, divergence, options), architecture=architecture)


def defines(found: Layout, divergence: str, options: tuple[tuple[str, bool], ...]) -> dict[str, object]:
    """What cluster_rows.cu is compiled with."""
    given = {
        "CLUSTER": found.cluster,
        "THREADS": found.threads,
        "SLICE": found.slice,
        "BLOCKS_PER_PROCESSOR": found.blocks_per_processor,
        "DIVERGENCE": divergence,
        **{name: int(value) for name, value in options},
    }
    return {f"KDFLOW_{name}": value for name, value in given.items()}


@functools.cache
def load(found: Layout, divergence: str, options: tuple[tuple[str, bool], ...], device: torch.device) -> nvrtc.Function:
    """One form, compiled for a device and loaded there."""
    major, minor = torch.cuda.get_device_capability(device)
    cubin = compile_form(found, divergence, options, architecture=10 * major + minor)
    large = found.cluster > PORTABLE_CLUSTER
    with torch.cuda.device(device):
        return nvrtc.Function(cubin, "cluster_rows", shared_bytes=found.shared_bytes, large_cluster=large)


def kernel(
    found: Layout, divergence: str, options: tuple[tuple[str, bool], ...], device: torch.device
) -> Callable[[int, Parameters], None]:
    """One form: starts so many blocks on torch's current stream."""
    function = load(found, divergence, options, device)

    def start(num_blocks: int, parameters: Parameters) -> None:
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            function.launch(num_blocks, found.threads, parameters, stream=stream)

    return start
