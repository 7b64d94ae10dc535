"""The fused KD loss: its public function and module, the choice of backend, and the autograd function.

Shape suffixes: N rows, Vs and Vt vocabularies of student and teacher, Hs and Ht hidden sizes, K compared tokens.
"""

import dataclasses
from types import ModuleType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from kdflow_kernels import reference, torch_backend, triton_backend, validation
from kdflow_kernels.divergences import Divergence
from kdflow_kernels.problem import GradientNeeds, Head, Problem, RowTerms


class KDLossOutput(NamedTuple):
    """Result of ``fused_kd_loss``. Only ``loss`` is differentiable; the rest is detached and on the inputs' device.

    With reduction "none" the first three are (N,), zero in ignored rows; everything else is a 0-d tensor.
    """

    loss: Tensor  # kd_weight * kd_loss + ce_weight * ce_loss
    kd_loss: Tensor  # nats; 0 without a teacher
    ce_loss: Tensor  # nats; 0 without labels
    student_entropy: Tensor  # nats, mean over the rows not ignored of H(q), q as the divergence sees it
    teacher_entropy: Tensor  # nats, the same of H(p); NaN without a teacher
    top1_agreement: Tensor  # share of the rows not ignored where argmax p = argmax q; NaN without a teacher
    num_tokens: Tensor  # int64, rows not ignored


def fused_kd_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    shift_labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    student_token_ids: Tensor | None = None,
    teacher_token_ids: Tensor | None = None,
    chunk_size: int | None = None,
    grad_filter_eps: float = 0.0,
    backend: str = "auto",
) -> KDLossOutput:
    """Distillation loss plus cross-entropy from hidden states, without ever holding (N, V) logits.

    Logits are ``softcap(logit_scale * (input @ weight.T + bias))``, ``softcap(z) = c * tanh(z / c)``. With p and q the
    softmax of the teacher's and the student's logits divided by ``temperature`` over the compared tokens::

        kd_n = divergence(p_n, q_n)                                  # no temperature ** 2 factor
        ce_n = cross_entropy(student logits_n, shift_labels_n)       # temperature 1, the student's whole head
        loss = sum_n row_weight_n * (kd_weight * kd_n + ce_weight * ce_n) / denominator

    over the rows not ignored. Gradients flow to student_input, student_weight and student_bias; the teacher's side is a
    constant. Call it inside the root module's forward under FSDP2, where the head's weight is a plain tensor.

    Args:
        student_input: (N, Hs) last hidden states at the positions that predict; bf16, fp16, fp32 or fp64.
        student_weight: (Vs, Hs) output head, of student_input's dtype (under autocast both are cast as linear would).
        teacher_input: (N, Ht) or None: cross-entropy alone, kd_weight must be 0 then.
        teacher_weight: (Vt, Ht) or None; the teacher's dtype may differ from the student's.
        shift_labels: (N,) int64, already shifted. Rows equal to ignore_index enter nothing. None: every row counts.
        divergence: a registered name (``list_divergences()``) or an instance such as ``JSD(beta=0.3)``.
        temperature: divides both logits in the KD term.
        kd_weight, ce_weight: weights of the two terms.
        row_weight: (N,) float, weight of each row in both terms; a constant.
        ignore_index: the label of rows to leave out.
        reduction: "mean" (denominator: num_items, else the number of rows not ignored; not the weights' sum), "sum"
            (denominator 1) or "none" (the rows' losses; gradients are then formed in backward).
        num_items: denominator of "mean", such as the step's loss tokens over all ranks and microbatches.
        student_bias, teacher_bias: (Vs,), (Vt,).
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap: see the formula.
        vocab_size: compare the first vocab_size tokens of both heads; the rest (padding) has no mass in the KD term.
        student_token_ids, teacher_token_ids: (K,) int64, distinct: compare these pairs of tokens only.
        chunk_size: rows whose teacher logits are held at once; None chooses. Bounds the memory, not the result.
        grad_filter_eps: above 0, columns of the vocabulary where no row of a chunk has |d row loss / d logit| above it
            are left out of the gradient's matrix products, but for a rank-1 term in student_input's. Approximate.
        backend: "triton" (CUDA), "torch" (anywhere), "reference" (full logits), or "auto": Triton on CUDA, else torch.

    Returns:
        KDLossOutput. The loss is fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: inputs that do not fit, each naming the argument and the remedy. Ids and labels are
            checked by value on CPU; on CUDA, where that would make the host wait, after
            ``kdflow_kernels.validation.check_values_on_cuda(True)``.

    Sources: each divergence names its own; forming gradients in the forward follows Liger-Kernel (arXiv 2410.10989).
    """
    if torch.is_autocast_enabled(student_input.device.type):
        dtype = torch.get_autocast_dtype(student_input.device.type)
        student_input, student_weight = student_input.to(dtype), student_weight.to(dtype)
        teacher_input = None if teacher_input is None else teacher_input.to(dtype)
        teacher_weight = None if teacher_weight is None else teacher_weight.to(dtype)

    student = Head(student_input, student_weight, student_bias, student_logit_scale, student_softcap, student_token_ids)
    teacher = None
    if teacher_input is not None and teacher_weight is not None:
        teacher = Head(
            teacher_input.detach(),
            teacher_weight.detach(),
            None if teacher_bias is None else teacher_bias.detach(),
            teacher_logit_scale,
            teacher_softcap,
            teacher_token_ids,
        )
    divergence = validation.check_divergence(divergence)
    num_compared = validation.check_heads(student, teacher, teacher_input, teacher_weight, kd_weight, vocab_size)
    validation.check_rows(student, shift_labels, row_weight, ignore_index, ce_weight)
    validation.check_scalars(
        temperature, kd_weight, ce_weight, reduction, num_items, chunk_size, grad_filter_eps, backend
    )

    num_rows = student_input.shape[0]
    keep = None if shift_labels is None else shift_labels != ignore_index
    accumulate = torch.promote_types(student_input.dtype, torch.float32)
    num_tokens = torch.full((), num_rows, device=student_input.device) if keep is None else keep.sum()
    scale = torch.ones(num_rows, device=student_input.device, dtype=accumulate)
    if row_weight is not None:
        scale = row_weight.detach().to(accumulate)
    if reduction == "mean":
        scale = scale / (num_tokens.clamp(min=1) if num_items is None else num_items)

    kept_rows = None  # (kept,) row numbers, where ignored rows were cut out
    labels = shift_labels
    if keep is not None and labels is not None:
        if student_input.device.type == "cpu":
            if int(num_tokens) < num_rows:
                kept_rows = keep.nonzero().squeeze(-1)
                labels, scale = labels[kept_rows], scale[kept_rows]
                student = dataclasses.replace(student, input=student.input.index_select(0, kept_rows))
                if teacher is not None:
                    teacher = dataclasses.replace(teacher, input=teacher.input.index_select(0, kept_rows))
        else:
            # Cutting rows out would make the host wait for their number: blank them instead, so that whatever they
            # hold meets only zeros.
            labels, scale = labels.masked_fill(~keep, 0), scale.masked_fill(~keep, 0.0)
            student = dataclasses.replace(student, input=student.input.masked_fill(~keep[:, None], 0.0))
            if teacher is not None:
                teacher = dataclasses.replace(teacher, input=teacher.input.masked_fill(~keep[:, None], 0.0))

    problem = Problem(
        student=student,
        teacher=teacher,
        labels=labels,
        row_scale=scale,
        num_compared=num_compared,
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        chunk_size=chunk_size,
        grad_filter_eps=grad_filter_eps,
    )
    with torch.autocast(student_input.device.type, enabled=False):
        module = choose_backend(backend, problem)
        if module is None:
            terms = reference.row_terms(problem)
            row_loss = _row_loss(problem, terms)
            loss = row_loss if reduction == "none" else row_loss.sum()
        else:
            loss, terms = _run_chunked(problem, module, per_row=reduction == "none")

    def reduce(rows: Tensor | None) -> Tensor:
        if rows is None:
            return scale.new_zeros(num_rows if reduction == "none" else ())
        rows = rows.detach() * scale
        return spread(rows) if reduction == "none" else rows.sum()

    def spread(rows: Tensor) -> Tensor:
        return rows if kept_rows is None else rows.new_zeros(num_rows).index_put((kept_rows,), rows)

    counted = None if keep is None or kept_rows is not None else keep

    def mean(rows: Tensor | None) -> Tensor:
        if rows is None:
            return scale.new_full((), float("nan"))
        total = (rows if counted is None else rows * counted).sum()
        return total.detach() / num_tokens.clamp(min=1)

    return KDLossOutput(
        loss=spread(loss) if reduction == "none" else loss,
        kd_loss=reduce(terms.kd),
        ce_loss=reduce(terms.ce),
        student_entropy=mean(terms.student_entropy),
        teacher_entropy=mean(terms.teacher_entropy),
        top1_agreement=mean(terms.top1_agreement),
        num_tokens=num_tokens,
    )


def choose_backend(backend: str, problem: Problem) -> ModuleType | None:
    """The module that runs the problem; None: the reference, which is no chunked backend.

    "auto" is Triton on CUDA where triton is installed, else torch. What the row kernel does not cover (fp64, divergences
    without a JIT form) goes to torch from both. Raises RuntimeError for "triton" where it cannot run.
    """
    if backend == "reference":
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


def _row_loss(problem: Problem, terms: RowTerms) -> Tensor:
    """row_scale * (kd_weight * kd + ce_weight * ce), (N,)."""
    loss = torch.zeros_like(problem.row_scale)
    if terms.kd is not None and problem.kd_weight != 0.0:
        loss = loss + problem.kd_weight * terms.kd
    if terms.ce is not None and problem.ce_weight != 0.0:
        loss = loss + problem.ce_weight * terms.ce
    return loss * problem.row_scale


def _run_chunked(problem: Problem, backend: ModuleType, *, per_row: bool) -> tuple[Tensor, RowTerms]:
    student = problem.student
    tracked = (student.input, student.weight, student.bias)
    needs = GradientNeeds(*(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tracked))
    results: list[RowTerms] = []
    loss = _ChunkedLoss.apply(*tracked, problem, backend, needs, per_row, results)
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
        row_loss = _row_loss(problem, terms)
        return row_loss if per_row else row_loss.sum()

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


class FusedKDLoss(nn.Module):
    """``fused_kd_loss`` with its options fixed; ``forward`` takes the five tensors, row_weight and num_items.

    Token ids move with the module; biases belong to the heads and are only referred to.
    """

    def __init__(
        self,
        *,
        divergence: str | Divergence = "forward_kl",
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        vocab_size: int | None = None,
        student_token_ids: Tensor | None = None,
        teacher_token_ids: Tensor | None = None,
        chunk_size: int | None = None,
        grad_filter_eps: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.divergence = validation.check_divergence(divergence)
        validation.check_scalars(
            temperature, kd_weight, ce_weight, reduction, None, chunk_size, grad_filter_eps, backend
        )
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.student_logit_scale = student_logit_scale
        self.teacher_logit_scale = teacher_logit_scale
        self.student_softcap = student_softcap
        self.teacher_softcap = teacher_softcap
        self.vocab_size = vocab_size
        self.chunk_size = chunk_size
        self.grad_filter_eps = grad_filter_eps
        self.backend = backend
        self.register_buffer("student_token_ids", student_token_ids, persistent=False)
        self.register_buffer("teacher_token_ids", teacher_token_ids, persistent=False)
        # In a tuple, so that nn.Module does not take them for parameters of its own.
        self._biases = (student_bias, teacher_bias)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor | None,
        teacher_weight: Tensor | None,
        shift_labels: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
    ) -> KDLossOutput:
        student_bias, teacher_bias = self._biases
        return fused_kd_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            divergence=self.divergence,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            row_weight=row_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            num_items=num_items,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_logit_scale=self.student_logit_scale,
            teacher_logit_scale=self.teacher_logit_scale,
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
            vocab_size=self.vocab_size,
            student_token_ids=cast("Tensor | None", self.student_token_ids),
            teacher_token_ids=cast("Tensor | None", self.teacher_token_ids),
            chunk_size=self.chunk_size,
            grad_filter_eps=self.grad_filter_eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        weights = f"kd_weight={self.kd_weight}, ce_weight={self.ce_weight}"
        return f"{self.divergence}, temperature={self.temperature}, {weights}"
