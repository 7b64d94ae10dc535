"""The choice of a chunked backend, and the autograd function around it."""

import dataclasses
from types import ModuleType

import torch
from torch import Tensor

from kdflow_kernels import torch_backend, triton_backend
from kdflow_kernels.problem import GradientNeeds, Head, Problem, RowTerms
from kdflow_kernels.validation import arrived

_HEAD_TENSORS = ("input", "weight", "bias", "token_ids")


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


class SecondDerivative(torch.autograd.Function):
    """A zero on the CPU that belongs to the tensors given and refuses to be differentiated.

    Added to gradients that autograd has not seen made, it turns terms that would be missing into an error.
    """

    @staticmethod
    def forward(ctx, *tensors):
        return torch.zeros((), dtype=tensors[0].dtype, device="cpu")

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(
            "fused_kd_loss: its gradients cannot be differentiated again, as a gradient penalty or a Hessian asks for; "
            "use backend='reference', where autograd forms them"
        )


class _ChunkedLoss(torch.autograd.Function):
    """Runs a chunked backend. A scalar loss has its gradients formed in the forward, a loss per row in the backward.

    Whatever backward needs is kept by save_for_backward: it notices changes in place, and lets go after the backward.
    """

    @staticmethod
    def forward(ctx, student_input, student_weight, student_bias, problem, backend, needs, per_row, results):
        problem = _with_tensors(problem, [None if t is None else arrived(t) for t in _tensors(problem)])
        formed_here = needs if not per_row else GradientNeeds(False, False, False)
        terms, gradients = backend.run(problem, formed_here)
        results.append(terms)
        if needs:
            with torch.enable_grad():
                refusal = SecondDerivative.apply(student_input, student_weight, student_bias)
            formed = (gradients.input, gradients.weight, gradients.bias)
            ctx.save_for_backward(refusal, *(_tensors(problem) if per_row else formed))
            ctx.backend, ctx.needs, ctx.per_row = backend, needs, per_row
            ctx.dtypes = [None if t is None else t.dtype for t in (student_input, student_weight, student_bias)]
            ctx.problem = _with_tensors(problem, [None] * len(_tensors(problem)))
        loss = row_loss(problem, terms)
        return loss if per_row else loss.sum()

    @staticmethod
    def backward(ctx, grad_loss):
        refusal, *saved = ctx.saved_tensors
        with torch.no_grad():
            if ctx.per_row:
                problem = _with_tensors(ctx.problem, saved)
                problem = dataclasses.replace(problem, row_scale=problem.row_scale * grad_loss)
                _, gradients = ctx.backend.run(problem, ctx.needs)
                formed = [gradients.input, gradients.weight, gradients.bias]
            elif torch._C._autograd._get_current_graph_task_keep_graph():  # type: ignore[attr-defined]
                formed = [None if gradient is None else gradient * grad_loss for gradient in saved]
            else:
                # Nobody will ask again: in place, without room for a second gradient of the head.
                formed = saved
                for gradient in formed:
                    if gradient is not None:
                        ctx.backend.scale_(gradient, grad_loss)
            formed = [None if g is None else g.to(dtype) for g, dtype in zip(formed, ctx.dtypes, strict=True)]
        if torch.is_grad_enabled():
            refusal = SecondDerivative.apply(grad_loss, refusal)
            formed = [None if gradient is None else gradient + refusal for gradient in formed]
        return *formed, None, None, None, None, None


def _tensors(problem: Problem) -> list[Tensor | None]:
    heads = (problem.student, problem.teacher)
    of_heads = [None if head is None else getattr(head, name) for head in heads for name in _HEAD_TENSORS]
    return [*of_heads, problem.labels, problem.row_scale]


def _with_tensors(problem: Problem, tensors: list[Tensor | None]) -> Problem:
    """The problem with these in place of its ``_tensors``."""

    def with_its(head: Head, its: list[Tensor | None]) -> Head:
        return dataclasses.replace(head, **dict(zip(_HEAD_TENSORS, its, strict=True)))

    *of_heads, labels, row_scale = tensors
    return dataclasses.replace(
        problem,
        student=with_its(problem.student, of_heads[:4]),
        teacher=None if problem.teacher is None else with_its(problem.teacher, of_heads[4:]),
        labels=labels,
        row_scale=row_scale,  # type: ignore[arg-type]
    )
