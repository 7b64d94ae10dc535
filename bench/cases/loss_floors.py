"""The floors of ``bench loss``: the matrix products alone, into buffers made before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F

from bench.cases.loss_ce import CrossEntropyInputs
from bench.cases.loss_providers import Inputs, Params
from bench.model import Trial

Cast = Literal["nothing", "inside", "before"]


def gemms(params: Params) -> Trial:
    """Both projections and the two gradient GEMMs in the case's dtype."""
    return gemm_trial(Inputs.make(params))


def upcast_gemms(params: Params) -> Trial:
    """The same in fp32, operands cast up and gradients cast down inside the step."""
    return gemm_trial(Inputs.make(params), cast="inside")


def fp32_gemms(params: Params) -> Trial:
    """The same in fp32 on operands cast up before."""
    return gemm_trial(Inputs.make(params), cast="before")


def student_gemms(params: Params) -> Trial:
    """The student's projection and the two gradient GEMMs: what cross-entropy needs."""
    return gemm_trial(CrossEntropyInputs.make(params))


def upcast_student_gemms(params: Params) -> Trial:
    return gemm_trial(CrossEntropyInputs.make(params), cast="inside")


def fp32_student_gemms(params: Params) -> Trial:
    return gemm_trial(CrossEntropyInputs.make(params), cast="before")


@torch.no_grad()
def gemm_trial(inputs: Inputs | CrossEntropyInputs, *, cast: Cast = "nothing") -> Trial:
    operands = [tensor.detach() for tensor in inputs.operands]
    if cast == "before":
        operands = [tensor.float() for tensor in operands]
    dtype = torch.float32 if cast == "inside" else operands[0].dtype
    raised = [torch.empty_like(tensor, dtype=dtype) for tensor in operands] if cast == "inside" else []
    rows, vocab = operands[0].shape[0], operands[1].shape[0]
    student_logits = operands[0].new_zeros(rows, vocab, dtype=dtype)
    teacher_logits = torch.zeros_like(student_logits) if len(operands) > 2 else None
    grad_input = torch.zeros_like(operands[0], dtype=dtype)
    grad_weight = torch.zeros_like(operands[1], dtype=dtype)
    lowered = [torch.empty_like(tensor) for tensor in operands[:2]] if cast == "inside" else []
    # On a GPU the values matter: its clocks follow its power, and that follows them. On a CPU the
    # logits stand in for their own gradient.
    grad_logits = _grad_logits(operands) if student_logits.is_cuda else student_logits

    @torch.no_grad()
    def step() -> None:
        for target, source in zip(raised, operands, strict=False):
            target.copy_(source)
        student_input, student_weight, *teacher = raised or operands
        torch.mm(student_input, student_weight.T, out=student_logits)
        if teacher_logits is not None:
            torch.mm(teacher[0], teacher[1].T, out=teacher_logits)
        torch.mm(grad_logits, student_weight, out=grad_input)
        torch.mm(grad_logits.T, student_input, out=grad_weight)
        for target, source in zip(lowered, (grad_input, grad_weight), strict=False):
            target.copy_(source)

    return Trial(step, note=f"{dtype}".removeprefix("torch."), on_stream=True)


def _grad_logits(operands: Sequence[torch.Tensor]) -> torch.Tensor:
    """(N, V) of forward KL, or of cross-entropy but for the labels' own columns."""
    student_input, student_weight, *teacher = operands
    pieces = []
    for start in range(0, len(student_input), 512):
        rows = slice(start, start + 512)
        piece = F.softmax((student_input[rows] @ student_weight.T).float(), -1)
        if teacher:
            piece -= F.softmax((teacher[0][rows] @ teacher[1].T).float(), -1)
        pieces.append(piece.div_(len(student_input)).to(student_input.dtype))
    return torch.cat(pieces)
