"""Launches the row kernels on a chunk of rows: what a divergence of whole rows needs first, then the row kernel.

Shape suffixes: c rows of a chunk, V columns of the student, K compared ones.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdflow_kernels.divergences import JITChoices, JITPointwise
from kdflow_kernels.problem import GradientNeeds, Head, Problem, RowTerms
from kdflow_kernels.registers import launch

# Of the kernels before the row kernel: two programs of 8 warps on a processor. ptxas would take 170 and leave one.
STATISTICS_REGISTERS = 128


@dataclass(frozen=True)
class Layout:
    """How a kernel is laid out: LANES x WIDTH columns a block, warps and number of programs; see row_kernel."""

    lanes: int
    width: int
    num_warps: int
    num_programs: int
    kept_share: int

    @property
    def block(self) -> int:
        return self.lanes * self.width


class RowLauncher:
    """Everything about a problem that is the same in all its chunks of at most chunk_rows rows.

    Args:
        row_scale: (N,) fp32, the problem's, or what stands for it.
        teacher_ids: (V,) int32, the teacher's column for each of the student's, -1 for none; None: the same column.
        active: (V,) int8, set to 1 where grad_filter_eps is exceeded; None: not filtering.
    """

    def __init__(
        self,
        problem: Problem,
        needs: GradientNeeds,
        *,
        layout: Layout,
        num_columns: int,
        chunk_rows: int,
        row_scale: Tensor,
        teacher_ids: Tensor | None,
        active: Tensor | None,
    ) -> None:
        self.problem, self.needs, self.layout, self.num_columns = problem, needs, layout, num_columns
        self.row_scale, self.teacher_ids, self.active = row_scale, teacher_ids, active
        twin = None if problem.teacher is None else problem.divergence.jit()
        self.pointwise = twin if isinstance(twin, JITPointwise) else None
        self.choices = twin if isinstance(twin, JITChoices) else None
        self.top_k = 0 if self.choices is None else min(self.choices.top_k, problem.num_compared)
        device = row_scale.device
        self.row_parameters = self.columns = self.gradients = None
        if self.pointwise is not None and self.pointwise.row_parameters is not None:
            self.row_parameters = torch.empty((chunk_rows, 2), dtype=torch.float32, device=device)
        if self.choices is not None:
            shape = (chunk_rows, 2 * self.top_k)
            self.columns = torch.empty(shape, dtype=torch.int32, device=device)
            self.gradients = torch.empty(shape, dtype=torch.float32, device=device)

    def launch(
        self, chunk: slice, student_logits: Tensor, teacher_logits: Tensor | None, gradient: Tensor, terms: RowTerms
    ) -> None:
        """Fills the chunk's terms and, where gradients are needed, gradient (c, >= V), which may be student_logits."""
        from kdflow_kernels.row_kernels import row_kernel
        from kdflow_kernels.statistics_kernels import choice_kernel

        pointwise = self.pointwise
        grid = self._grid(chunk)
        sources = self._sources(chunk.stop - chunk.start, student_logits, teacher_logits)
        of_rows = self._of_rows(chunk, gradient, terms)
        with on(self.row_scale.device):
            if pointwise is not None and pointwise.row_parameters is not None:
                launch(
                    pointwise.row_parameters,
                    grid,
                    {**sources, "row_parameters": self.row_parameters, "parameter": of_rows["parameter"]},
                    allowance=STATISTICS_REGISTERS,
                )
            if self.choices is not None:
                of_choices = {
                    "kd": of_rows["kd"],
                    "choices": self.columns,
                    "choice_gradients": self.gradients,
                    "OF_CHOICES": self.choices.function,
                    "TOP_K": self.top_k,
                    "CHOICES": power_of_two(self.top_k),
                    "STEPS": power_of_two(-(-self.num_columns // self.layout.block)),
                }
                launch(choice_kernel, grid, {**sources, **of_choices}, allowance=STATISTICS_REGISTERS)
            launch(row_kernel, grid, {**sources, **of_rows})

    def _grid(self, chunk: slice) -> tuple[int]:
        return (min(chunk.stop - chunk.start, self.layout.num_programs),)

    def _of_rows(self, chunk: slice, gradient: Tensor, terms: RowTerms) -> dict[str, Any]:
        """What the row kernel is given beside its sources, for whole rows."""
        problem, pointwise = self.problem, self.pointwise

        def rows_of(tensor: Tensor | None) -> Tensor:
            return self._or_nothing(None if tensor is None else tensor[chunk])

        return {
            "labels": rows_of(problem.labels),
            "row_scale": self.row_scale[chunk],
            "row_parameters": self._or_nothing(self.row_parameters),
            "choices": self._or_nothing(self.columns),
            "choice_gradients": self._or_nothing(self.gradients),
            "active": self._or_nothing(self.active),
            "gradient": gradient,
            "gradient_stride": gradient.stride(0),
            "kd": rows_of(terms.kd),
            "ce": rows_of(terms.ce),
            "student_entropy": rows_of(terms.student_entropy),
            "teacher_entropy": rows_of(terms.teacher_entropy),
            "agreement": rows_of(terms.top1_agreement),
            "statistics": self.row_scale,
            "kd_weight": problem.kd_weight,
            "ce_weight": problem.ce_weight,
            "parameter": 0.0 if pointwise is None else pointwise.parameter,
            "filter_eps": problem.grad_filter_eps,
            "POINTWISE": None if pointwise is None else pointwise.function,
            "GRADIENT_SUM": None if pointwise is None else pointwise.gradient_sum,
            "ROW_PARAMETERS": self.row_parameters is not None,
            "NUM_CHOICES": 2 * self.top_k,
            "FILTER": self.active is not None,
            "HAS_TEACHER": problem.teacher is not None,
            "HAS_LABELS": problem.labels is not None,
            "KD_GRADIENT": bool(self.needs) and problem.teacher is not None and problem.kd_weight != 0.0,
            "CE_GRADIENT": bool(self.needs) and problem.ce_weight != 0.0 and problem.labels is not None,
            "TEMPERED": problem.temperature != 1.0,
            "KEPT_SHARE": self.layout.kept_share,
            "STAGE": "whole",
        }

    def _sources(self, num_rows: int, student_logits: Tensor, teacher_logits: Tensor | None) -> dict[str, Any]:
        """What all kernels are given: both sides' logits, how to read them, and the layout."""
        problem, student, teacher = self.problem, self.problem.student, self.problem.teacher
        return {
            "student": student_logits,
            "student_stride": student_logits.stride(0),
            "teacher": self._or_nothing(teacher_logits),
            "teacher_stride": 0 if teacher_logits is None else teacher_logits.stride(0),
            "teacher_ids": self._or_nothing(self.teacher_ids),
            "student_bias": self._or_nothing(student.bias),
            "teacher_bias": self._or_nothing(None if teacher is None else teacher.bias),
            "num_rows": num_rows,
            "V": self.num_columns,
            "K": problem.num_compared,
            "inverse_temperature": 1.0 / problem.temperature,
            "student_scale": student.logit_scale,
            "student_softcap": student.softcap or 1.0,
            "teacher_scale": 1.0 if teacher is None else teacher.logit_scale,
            "teacher_softcap": 1.0 if teacher is None else teacher.softcap or 1.0,
            "PARTIAL": problem.num_compared != self.num_columns,
            "PAIRED": self.teacher_ids is not None,
            **_flags("STUDENT", student),
            **_flags("TEACHER", teacher),
            "LANES": self.layout.lanes,
            "WIDTH": self.layout.width,
            "num_warps": self.layout.num_warps,
        }

    def _or_nothing(self, tensor: Tensor | None) -> Tensor:
        """The tensor, or something that stands for a pointer the kernel does not follow."""
        return self.row_scale if tensor is None else tensor


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor (a 0-d tensor); where it is 1, as in loss.backward(), the gradient is not even read."""
    from kdflow_kernels.row_kernels import SCALE_BLOCK, scale_kernel

    count = gradient.numel()
    if count:
        with on(gradient.device):
            grid = (min(-(-count // SCALE_BLOCK.value), 2048),)
            scale_kernel[grid](gradient, factor, count)  # pyright: ignore[reportIndexIssue]


def on(device: torch.device):
    return torch.cuda.device(device if device.type == "cuda" else -1)


def power_of_two(number: int) -> int:
    """The smallest one not below number, at least 1."""
    return 1 << max(number - 1, 0).bit_length()


def _flags(side: str, head: Head | None) -> dict[str, bool]:
    return {
        f"{side}_BIAS": head is not None and head.bias is not None,
        f"{side}_SCALE": head is not None and head.logit_scale != 1.0,
        f"{side}_SOFTCAP": head is not None and head.softcap is not None,
    }
