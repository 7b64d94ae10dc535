"""The choice of a chunked backend, and the autograd function around it."""

import dataclasses
from types import ModuleType

import torch
from torch import Tensor

from kdflow_kernels import torch_backend, triton_backend
from kdflow_kernels.problem import GradientNeeds, Problem, RowTerms


def choose_backend(backend: str, problem: Problem) -> ModuleType | None:
    """The module that runs the problem; None: the reference, which is no chunked backend.

    "auto" is Triton on CUDA where triton is installed, else torch. What the row kernel does not cover (fp64, divergences
    without a JIT form) goes to torch from both. Raises RuntimeError for "triton" where it cannot run.
    """
    if backend == "reference":
        if problem.vocab_parallel is not None:
            raise ValueError("backend: 'reference' cannot have vocab_parallel; use 'torch' or 'triton', or 'auto'")
        return None
    if backend == "torch":
        return torch_backend
    device = problem.student.input.device
    reason = triton_backend.unavailable(device)
    if backend == "triton" and reason is not None:
        raise RuntimeError(f"backend='triton': {reason}; or use backend='torch', which runs anywhere, or 'auto'")
    if backend == "auto" and (reason is not None or device.type != "cuda"):
        return torch_backend
    return triton_backend if triton_backend.supports(problem) else torch_backend


def row_loss(problem: Problem, terms: RowTerms) -> Tensor:
    """row_scale * (kd_weight * kd + ce_weight * ce), (N,)."""
    loss = torch.zeros_like(problem.row_scale)
    if terms.kd is not None and problem.kd_weight != 0.0:
        loss = loss + problem.kd_weight * terms.kd
    if terms.ce is not None and problem.ce_weight != 0.0:
        loss = loss + problem.ce_weight * terms.ce
    return loss * problem.row_scale


def chunked_loss(problem: Problem, backend: ModuleType, *, per_row: bool) -> tuple[Tensor, RowTerms]:
    """The problem's loss, differentiable in the student's tensors, and its detached terms."""
    student = problem.student
    tensors = (student.input, student.weight, student.bias)
    needs = GradientNeeds(*(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors))
    results: list[RowTerms] = []
    loss = _ChunkedLoss.apply(*tensors, problem, backend, needs, per_row, results)
    return loss, results[0]


class _ChunkedLoss(torch.autograd.Function):
    """Runs a chunked backend. A scalar loss has its gradients formed in the forward, a loss per row in the backward."""

    @staticmethod
    def forward(ctx, student_input, student_weight, student_bias, problem, backend, needs, per_row, results):
        student = dataclasses.replace(
            problem.student,
            input=student_input.detach(),
            weight=student_weight.detach(),
            bias=None if student_bias is None else student_bias.detach(),
        )
        problem = dataclasses.replace(problem, student=student)
        formed_here = needs if not per_row else GradientNeeds(False, False, False)
        terms, gradients = backend.run(problem, formed_here)
        results.append(terms)
        if needs:
            ctx.save_for_backward(student_input, student_weight, student_bias)
            ctx.problem, ctx.backend, ctx.needs = problem, backend, needs
            ctx.gradients = None if per_row else gradients
        loss = row_loss(problem, terms)
        return loss if per_row else loss.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        tensors = ctx.saved_tensors  # raises if an input was changed in place since the forward
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            # A loss per row, or a second backward through a retained graph: form them now.
            problem = dataclasses.replace(ctx.problem, row_scale=ctx.problem.row_scale * grad_loss)
            _, gradients = ctx.backend.run(problem, ctx.needs)
        else:
            for gradient in (gradients.input, gradients.weight, gradients.bias):
                if gradient is not None:
                    ctx.backend.scale_(gradient, grad_loss)
        gradients = [
            None if gradient is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip((gradients.input, gradients.weight, gradients.bias), tensors, strict=True)
        ]
        return *gradients, None, None, None, None, None
