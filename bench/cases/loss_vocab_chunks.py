"""The loss in plain torch by chunks of the vocabulary: all rows by some columns at a time, never (N, V).

One sweep over the vocabulary finds both log-normalisers, one more forms the gradients, each with both projections made
again. Where the sum over the vocabulary of df/dlog q is not the same in every row, a sweep between them finds it. So
2NV(2Ht + 4Hs) flops with forward KL and 2NV(3Ht + 5Hs) with the others, where ours takes 2NV(Ht + 3Hs).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.cases.loss_providers import BETAS, Inputs, Params, loss_trial
from bench.model import Trial

CHUNK_COLUMNS = 4096


def vocab_chunks(params: Params) -> Trial:
    beta = BETAS[params["divergence"]]

    def loss_of(inputs: Inputs) -> Tensor:
        return vocab_chunked_loss(
            inputs.student_input, inputs.student_weight, inputs.teacher_input, inputs.teacher_weight, beta
        )

    return loss_trial(Inputs.make(params), loss_of)


def vocab_chunked_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    beta: float,
    chunk_columns: int = CHUNK_COLUMNS,
) -> Tensor:
    """Mean over the rows of the divergence that ``loss_providers.full_logit_loss`` computes."""
    loss = _VocabChunks.apply(student_input, student_weight, teacher_input, teacher_weight, beta, chunk_columns)
    assert isinstance(loss, Tensor)
    return loss


class _VocabChunks(torch.autograd.Function):
    """Forms both gradients in the forward, as the fused losses beside it do."""

    @staticmethod
    def forward(ctx, student_input, student_weight, teacher_input, teacher_weight, beta, chunk_columns):
        num_rows, wide = len(student_input), torch.promote_types(student_input.dtype, torch.float32)
        chunks = [slice(start, start + chunk_columns) for start in range(0, len(student_weight), chunk_columns)]

        def logits() -> Iterator[tuple[slice, Tensor, Tensor]]:
            for columns in chunks:
                student = student_input @ student_weight[columns].T
                teacher = teacher_input @ teacher_weight[columns].T
                yield columns, student.to(wide), teacher.to(wide)

        of_student = student_input.new_full((num_rows,), -math.inf, dtype=wide)
        of_teacher = of_student.clone()
        for _, student, teacher in logits():
            of_student = torch.logaddexp(of_student, student.logsumexp(-1))
            of_teacher = torch.logaddexp(of_teacher, teacher.logsumexp(-1))

        def terms() -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
            for columns, student, teacher in logits():
                yield columns, *_terms(teacher - of_teacher[:, None], student - of_student[:, None], beta)

        loss, gradient_sum = torch.zeros_like(of_student), torch.full_like(of_student, -1.0)
        if beta != 0.0:
            gradient_sum.zero_()
            for _, _, _, g in terms():
                gradient_sum += g.sum(-1)
        grad_input = torch.zeros_like(student_input, dtype=wide)
        grad_weight = torch.empty_like(student_weight)
        for columns, q, f, g in terms():
            loss += f.sum(-1)
            dz = g.addcmul_(q, gradient_sum[:, None], value=-1.0).div_(num_rows).to(student_input.dtype)
            grad_input += dz @ student_weight[columns]
            torch.mm(dz.T, student_input, out=grad_weight[columns])
        ctx.save_for_backward(grad_input.to(student_input.dtype), grad_weight)
        return loss.mean()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (factor,) = grad_outputs
        grad_input, grad_weight = ctx.saved_tensors
        return grad_input * factor, grad_weight * factor, None, None, None, None


def _terms(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """q, the divergence's terms f and df/dlog q; p is the teacher."""
    p, q = log_p.exp(), log_q.exp()
    if beta == 0.0:
        return q, p * (log_p - log_q), -p
    if beta == 1.0:
        f = q * (log_q - log_p)
        return q, f, f + q
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    g = (1.0 - beta) * q * (log_q - log_m)
    return q, beta * p * (log_p - log_m) + g, g
