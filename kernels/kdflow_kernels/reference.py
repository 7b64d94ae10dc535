"""The oracle: full logits, eager fp32 (fp64 for fp64 inputs), gradients by autograd. Slow and plain on purpose."""

import torch
from torch import Tensor

from kdflow_kernels.divergences import rows_of
from kdflow_kernels.problem import LOWEST_LOGIT, Head, Problem, RowTerms


def logits(head: Head) -> Tensor:
    """softcap(logit_scale * (input @ weight.T + bias)) over the whole head, (N, V), in fp32 or fp64."""
    dtype = torch.promote_types(head.input.dtype, torch.float32)
    z = head.input.to(dtype) @ head.weight.to(dtype).T
    if head.bias is not None:
        z = (z + head.bias.to(dtype)).clamp(min=LOWEST_LOGIT)
    z = z * head.logit_scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z


def compared(z: Tensor, head: Head, num_compared: int) -> Tensor:
    """The K columns of z that the divergence sees."""
    return z[:, :num_compared] if head.token_ids is None else z[:, head.token_ids]


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy of each row in nats; a token of probability 0 adds nothing."""
    return -torch.special.xlogy(log_probs.exp(), log_probs.exp()).sum(-1)


def row_terms(problem: Problem) -> RowTerms:
    """Every per-row result, kd and ce differentiable in the student's tensors."""
    student_z = logits(problem.student)
    log_q = (compared(student_z, problem.student, problem.num_compared) / problem.temperature).log_softmax(-1)
    student_entropy = entropy(log_q.detach())

    ce = None
    if problem.labels is not None:
        ce = -student_z.log_softmax(-1).gather(-1, problem.labels.unsqueeze(-1)).squeeze(-1)
    if problem.teacher is None:
        return RowTerms(None, ce, student_entropy, None, None)

    with torch.no_grad():
        teacher_z = compared(logits(problem.teacher), problem.teacher, problem.num_compared)
        log_p = (teacher_z / problem.temperature).log_softmax(-1).to(log_q.dtype)
        agreement = (log_p.argmax(-1) == log_q.argmax(-1)).to(log_p.dtype)
    kd = rows_of(problem.divergence, log_p, log_q)
    return RowTerms(kd, ce, student_entropy, entropy(log_p), agreement)
