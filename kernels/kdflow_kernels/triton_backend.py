"""The chunked algorithm on CUDA: cuBLAS for the products, one Triton kernel for the rows between them.

For each group of rows:

1. the student's logits; for each chunk of the group's rows the teacher's, and the row kernel, which turns the student's
   into dloss/dlogits;
2. dH = dz W and dW += dz^T H.

Nothing is computed twice: 2NV(Ht + 3Hs) flops, what full logits cost. Nothing makes the host wait for the device, but for
grad_filter_eps: once a group the host learns how many columns are active, and step 2 is done over these alone.

Shape suffixes: N rows, n rows of a group, c rows of a chunk, V columns of the student, K compared ones, H hidden size.
"""

import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from kdflow_kernels import cluster_rows
from kdflow_kernels.cluster_rows import ClusterLauncher
from kdflow_kernels.problem import LOWEST_LOGIT, GradientNeeds, Gradients, Head, Problem, RowTerms
from kdflow_kernels.products import FilteredProducts, multiply
from kdflow_kernels.row_launch import Layout, RowLauncher, scale_
from kdflow_kernels.vocab_parallel_launch import VocabParallelLauncher, with_own_labels

__all__ = ["keep_logits_in_fp32", "run", "scale_", "supports", "unavailable"]

# What the student's logits of a group may take: 2048 rows of the widest vocabularies.
LOGITS_BYTES = 640 * 2**20
# Of so many rows, half of it in fp32, the teacher's logits are held.
CHUNK_ROWS = 1024
# Rows of logits begin this many numbers apart beyond whole blocks: at multiples of a large power of two they would
# compete for the same parts of the memory.
STAGGER = 64
# Of the row kernel; see Layout.
LANES = 512
NUM_WARPS = 8
PROGRAMS_PER_PROCESSOR = 4
# Of the row kernel: 0 is what was measured. A model of the cache prefers 4; see docs/design/hopper_kernels.md.
KEPT_SHARE = 0
# Rows in the shared memory of a cluster where cluster_rows covers the problem. Not measured on a GPU yet.
CLUSTER_ROWS = False
# Up to here the weight's gradient is summed over groups in its own dtype: a handful of roundings, 1.6 times the error of
# one at four groups. Beyond, in fp32.
GROUPS_IN_LOW_PRECISION = 6

_fp32_logits = False


def keep_logits_in_fp32(enabled: bool) -> None:
    """Store the logits of bf16 and fp16 heads in fp32 between the products and the row kernel.

    They are sums in fp32 either way; stored in bf16, as full-logit code has them, they keep 8 bits. It costs about an
    eighth of the time and 300 MiB at a vocabulary of 150,000.
    """
    global _fp32_logits
    _fp32_logits = enabled


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot run on a device; None: it can."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed; install kdflow[triton]"
    if device.type == "cuda" or interpreting():
        return None
    return (
        f"it needs a CUDA device, got {device.type}; for tests on CPU set TRITON_INTERPRET=1 before triton is imported"
    )


def supports(problem: Problem) -> bool:
    """Whether the row kernel covers this problem; torch_backend serves the others."""
    dtypes = {head.weight.dtype for head in (problem.student, problem.teacher) if head is not None}
    return torch.float64 not in dtypes and (problem.teacher is None or problem.divergence.jit() is not None)


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def run(problem: Problem, needs: GradientNeeds) -> tuple[RowTerms, Gradients]:
    """Row terms and the gradients needed, in the student's dtype, but in fp32 for fp16: see torch_backend.run."""
    from_teacher = problem.teacher is not None and problem.kd_weight != 0.0
    if not needs or from_teacher or (problem.labels is not None and problem.ce_weight != 0.0):
        return _Run(problem, needs).run()
    terms, _ = _Run(problem, GradientNeeds(False, False, False)).run()
    head = problem.student
    dtype = torch.float32 if head.weight.dtype == torch.float16 else head.weight.dtype
    input, weight = torch.zeros_like(head.input, dtype=dtype), torch.zeros_like(head.weight, dtype=dtype)
    bias = weight.new_zeros(len(weight), dtype=torch.float32)
    return terms, Gradients(
        input=input if needs.input else None, weight=weight if needs.weight else None, bias=bias if needs.bias else None
    )


def layout(item_bytes: int, num_columns: int, num_processors: int) -> Layout:
    """For rows of num_columns logits of item_bytes: WIDTH logits make 16 bytes, one load of a thread."""
    width = 16 // item_bytes
    lanes = LANES
    while lanes > 32 and lanes * width >= 2 * num_columns:
        lanes //= 2
    return Layout(lanes, width, min(NUM_WARPS, lanes // 32), PROGRAMS_PER_PROCESSOR * num_processors, KEPT_SHARE)


def plan_groups(num_rows: int, row_bytes: int) -> int:
    """Rows of a group: as even as LOGITS_BYTES allows, in whole tiles of the products."""
    most = max(1, LOGITS_BYTES // row_bytes)
    num_groups = max(1, -(-num_rows // most))
    even = -(-num_rows // num_groups)
    return max(1, min(most, -(-even // 128) * 128, num_rows))


class _Run:
    def __init__(self, problem: Problem, needs: GradientNeeds) -> None:
        problem = _without_strides(problem)
        self.problem, self.needs = problem, needs
        student, self.device = problem.student, problem.student.weight.device
        self.num_rows = student.input.shape[0]
        self.dtype = student.weight.dtype
        self.columns = problem.num_compared
        if problem.labels is not None or student.token_ids is not None:
            self.columns = student.weight.shape[0]
        self.filtering = bool(needs) and problem.grad_filter_eps > 0.0
        self.num_processors = _num_processors(self.device)
        self.logits_dtype = _logits_dtype(self.dtype)
        self.in_place = self.logits_dtype == self.dtype
        self.row_scale = problem.row_scale.float()
        # fp16 gradients of a mean over many rows would underflow: form them for rows of scale 1, scale the products.
        self.unit = None
        if self.dtype == torch.float16 and needs and self.num_rows:
            self.unit = self.row_scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            self.row_scale = self.row_scale / self.unit
        self._plan()

    def _plan(self) -> None:
        problem = self.problem
        item = self.logits_dtype.itemsize
        teacher = problem.teacher
        items = item if teacher is None else max(item, _logits_dtype(teacher.weight.dtype).itemsize)
        self.layout = layout(items, self.columns, self.num_processors)
        block = self.layout.block
        self.padded = -(-self.columns // block) * block + STAGGER
        self.teacher_columns, self.teacher_width = problem.num_compared, self.padded
        if teacher is not None and teacher.token_ids is not None and problem.student.token_ids is not None:
            self.teacher_columns = teacher.weight.shape[0]
            self.teacher_width = max(self.padded, -(-self.teacher_columns // 64) * 64 + STAGGER)
        self.group_rows = plan_groups(self.num_rows, self.padded * self.dtype.itemsize)
        if problem.vocab_parallel is not None:  # the same in all ranks, whatever their parts
            self.group_rows = max(1, min(self.num_rows, 2 * CHUNK_ROWS))
        if self.filtering:
            self.group_rows = min(self.group_rows, problem.chunk_size or self.group_rows)
        # The kernel counts in 32 bits inside a block of rows.
        most = max(1, (2**31 - 1) // max(self.teacher_width, 1))
        self.chunk_rows = min(problem.chunk_size or CHUNK_ROWS * 2 // items, self.group_rows, most)
        if not self.needs:
            self.group_rows = self.chunk_rows

    def run(self) -> tuple[RowTerms, Gradients]:
        needs, student = self.needs, self.problem.student
        terms = RowTerms.empty(self.problem, torch.float32)
        gradient_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype
        grad_input = torch.empty_like(student.input, dtype=gradient_dtype) if needs.input else None
        grad_weight = grad_bias = None
        num_groups = -(-self.num_rows // self.group_rows)
        if needs.weight:
            dtype = torch.float32 if num_groups > GROUPS_IN_LOW_PRECISION else gradient_dtype
            make = torch.empty if self.num_rows and not self.filtering else torch.zeros
            grad_weight = make(student.weight.shape, dtype=dtype, device=self.device)
            grad_weight[self.columns :] = 0.0
        if needs.bias:
            grad_bias = torch.zeros(student.weight.shape[0], dtype=torch.float32, device=self.device)
        if self.num_rows == 0:
            return terms, Gradients(grad_input, grad_weight, grad_bias)

        self._allocate()
        filtered = FilteredProducts(self.problem, self.columns, needs) if self.filtering else None
        for start in range(0, self.num_rows, self.group_rows):
            rows = slice(start, min(start + self.group_rows, self.num_rows))
            if self.active is not None:
                self.active.zero_()
            self._logits_to_gradients(rows, terms)
            dz = self.gradient[: rows.stop - start, : self.columns]
            if filtered is not None and self.active is not None:
                filtered.add(rows, dz, self.active, grad_input, grad_weight)
            else:
                if grad_input is not None:
                    multiply(dz, student.weight[: self.columns], out=grad_input[rows])
                if grad_weight is not None:
                    out = grad_weight[: self.columns]
                    multiply(dz.T, student.input[rows], out=out, accumulate=start > 0)
            if grad_bias is not None:
                grad_bias[: self.columns] += dz.sum(0, dtype=torch.float32)
        parallel = self.problem.vocab_parallel
        if parallel is not None and parallel.reduce_input_grad and grad_input is not None:
            dist.all_reduce(grad_input, group=parallel.group)
        if grad_weight is not None and grad_weight.dtype != gradient_dtype:
            grad_weight = grad_weight.to(gradient_dtype)
        if self.unit is not None:
            for gradient in (grad_input, grad_weight, grad_bias):
                if gradient is not None:
                    gradient.mul_(self.unit)
        return terms, Gradients(grad_input, grad_weight, grad_bias)

    def _allocate(self) -> None:
        problem = self.problem

        def logits(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            # Whole blocks are read: what lies beyond the columns must have no mass.
            made = torch.empty((rows, columns), dtype=dtype, device=self.device)
            made[:, min(self.columns, problem.num_compared) :] = max(LOWEST_LOGIT, torch.finfo(dtype).min)
            return made

        self.gradient = torch.empty((0, self.padded), dtype=self.dtype, device=self.device)
        if self.in_place:
            self.gradient = self.student_logits = logits(self.group_rows, self.padded, self.logits_dtype)
        else:
            self.student_logits = logits(self.chunk_rows, self.padded, self.logits_dtype)
            if self.needs:
                shape = (self.group_rows, self.padded)
                self.gradient = torch.empty(shape, dtype=self.dtype, device=self.device)
        self.teacher_ids = None
        if problem.teacher is not None:
            dtype = _logits_dtype(problem.teacher.weight.dtype)
            self.teacher_logits = logits(self.chunk_rows, self.teacher_width, dtype)
        if problem.student.token_ids is not None:
            ids = problem.student.token_ids if problem.teacher is None else problem.teacher.token_ids
            assert ids is not None
            self.teacher_ids = torch.full((self.columns,), -1, dtype=torch.int32, device=self.device)
            self.teacher_ids[problem.student.token_ids] = ids.to(torch.int32)
        self.active = None
        if self.filtering:
            self.active = torch.empty(self.columns, dtype=torch.int8, device=self.device)
        self.launcher = self._launcher()

    def _launcher(self) -> RowLauncher | ClusterLauncher:
        problem, columns = self.problem, self.columns
        if (
            CLUSTER_ROWS
            and cluster_rows.covers(problem, self.needs, num_columns=columns, logits_dtype=self.logits_dtype)
            and cluster_rows.unavailable(self.device) is None
        ):
            found = cluster_rows.layout(columns, cluster_rows.shared_bytes(self.device))
            if found is not None:
                return ClusterLauncher(
                    problem,
                    self.needs,
                    found=found,
                    num_columns=columns,
                    num_processors=self.num_processors,
                    row_scale=self.row_scale,
                )
        launcher = RowLauncher if problem.vocab_parallel is None else VocabParallelLauncher
        return launcher(
            with_own_labels(problem, columns),
            self.needs,
            layout=self.layout,
            num_columns=columns,
            chunk_rows=self.chunk_rows,
            row_scale=self.row_scale,
            teacher_ids=self.teacher_ids,
            active=self.active,
        )

    def _logits_to_gradients(self, rows: slice, terms: RowTerms) -> None:
        """Leaves dloss/dlogits of a group of rows in self.gradient, where gradients are needed."""
        student, teacher = self.problem.student, self.problem.teacher
        if self.in_place:
            out = self.student_logits[: rows.stop - rows.start, : self.columns]
            multiply(student.input[rows], student.weight[: self.columns].T, out=out)
        for start in range(rows.start, rows.stop, self.chunk_rows):
            chunk = slice(start, min(start + self.chunk_rows, rows.stop))
            in_group = slice(start - rows.start, chunk.stop - rows.start)
            if self.in_place:
                student_logits = self.student_logits[in_group]
            else:
                student_logits = self.student_logits[: chunk.stop - start]
                out = student_logits[:, : self.columns]
                multiply(student.input[chunk], student.weight[: self.columns].T, out=out)
            teacher_logits = None
            if teacher is not None:
                teacher_logits = self.teacher_logits[: chunk.stop - start]
                out = teacher_logits[:, : self.teacher_columns]
                multiply(teacher.input[chunk], teacher.weight[: self.teacher_columns].T, out=out)
            self.launcher.launch(chunk, student_logits, teacher_logits, self.gradient[in_group], terms)


def _without_strides(problem: Problem) -> Problem:
    """What the kernels read one number after another, as they read it: a caller's tensors may be views."""

    def dense(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    def with_dense_bias(head: Head) -> Head:
        return replace(head, bias=dense(head.bias))

    return replace(
        problem,
        student=with_dense_bias(problem.student),
        teacher=None if problem.teacher is None else with_dense_bias(problem.teacher),
        labels=dense(problem.labels),
        row_scale=problem.row_scale.contiguous(),
    )


def _logits_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if _fp32_logits else dtype


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
