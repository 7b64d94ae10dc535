"""The row step in torch: from a block of whole rows of logits to the rows' terms and dloss/dlogits.

Works on a few rows at a time, so that a handful of (rows, V) buffers stay in the processor's cache. Softmax and all sums
are in fp32 (fp64 for fp64 inputs).
"""

import torch
from torch import Tensor

from kdflow_kernels.problem import Problem, RowTerms

# Argmax in torch does not vectorise on CPU (2.3 ns a number where a maximum takes 0.1): take maxima of blocks, then look
# into one block.
ARGMAX_BLOCK = 128


def step(
    problem: Problem,
    student_logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    *,
    form_gradients: bool,
) -> tuple[RowTerms, Tensor | None]:
    """Terms of r rows and, if asked for, d(row_scale * row loss)/d(logits before scale and softcap).

    Shapes: student_logits (r, V), the K compared columns first; teacher_logits (r, K); labels (r,), column numbers;
    row_scale (r,). Returns (terms, gradient): the gradient is (r, V), or (r, K) when ce_weight is 0.
    """
    K, temperature = problem.num_compared, problem.temperature
    compared = student_logits[:, :K]
    q, log_q, student_top = _softmax(compared if temperature == 1.0 else compared / temperature)
    student_entropy = -torch.linalg.vecdot(q, log_q)

    kd = teacher_entropy = agreement = g = None
    if teacher_logits is not None:
        p, log_p, teacher_top = _softmax(teacher_logits if temperature == 1.0 else teacher_logits / temperature)
        p, log_p = p.to(q.dtype), log_p.to(q.dtype)
        teacher_entropy = -torch.linalg.vecdot(p, log_p)
        agreement = (student_top == teacher_top).squeeze(-1).to(q.dtype)
        kd, g = _divergence(problem, p, q, log_p, log_q, form_gradients)

    ce = ce_probs = None
    # At temperature 1 over the same columns both terms share one softmax.
    shared = temperature == 1.0 and student_logits.shape[1] == K
    if labels is not None:
        ce_log_probs = log_q
        if not shared:
            ce_probs, ce_log_probs, _ = _softmax(student_logits)
        ce = -ce_log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    terms = RowTerms(kd, ce, student_entropy, teacher_entropy, agreement)
    if not form_gradients:
        return terms, None

    ce_scale = None if problem.ce_weight == 0.0 else (problem.ce_weight * row_scale).unsqueeze(-1)
    q_scale = torch.zeros_like(row_scale).unsqueeze(-1) if ce_scale is None or not shared else ce_scale
    gradient = q
    if g is not None:
        # d/dz = (g - q sum g) / T
        kd_scale = (problem.kd_weight / temperature * row_scale).unsqueeze(-1)
        gradient.mul_(q_scale - kd_scale * g.sum(-1, keepdim=True)).addcmul_(g, kd_scale)
    else:
        gradient.mul_(q_scale)
    if ce_scale is not None and labels is not None:
        if ce_probs is not None:
            ce_probs.mul_(ce_scale)
            ce_probs[:, :K] += gradient
            gradient = ce_probs
        gradient.scatter_add_(-1, labels.unsqueeze(-1), -ce_scale)
    student = problem.student
    if student.softcap is not None:
        capped = student_logits[:, : gradient.shape[1]] / student.softcap
        gradient.mul_(1.0 - capped.square_())
    if student.logit_scale != 1.0:
        gradient.mul_(student.logit_scale)
    return terms, gradient


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and log-probabilities (r, V) and the most likely column (r, 1)."""
    probs = torch.softmax(z, dim=-1)
    top = _argmax(z)
    # softmax is exp(z - log_sum), so its value at one column gives log_sum without another pass.
    log_sum = z.gather(-1, top) - probs.gather(-1, top).log()
    return probs, z - log_sum, top


def _argmax(z: Tensor) -> Tensor:
    """z.argmax(-1, keepdim=True)."""
    num_columns = z.shape[-1]
    if z.device.type != "cpu" or num_columns < 2 * ARGMAX_BLOCK:
        return z.argmax(-1, keepdim=True)
    num_blocks = num_columns // ARGMAX_BLOCK
    even = num_blocks * ARGMAX_BLOCK
    maxima = z[:, :even].unflatten(-1, (num_blocks, ARGMAX_BLOCK)).amax(-1)
    first = maxima.argmax(-1, keepdim=True) * ARGMAX_BLOCK
    # The last block is looked into as well: it covers the columns left over.
    offsets = torch.arange(ARGMAX_BLOCK, device=z.device)
    candidates = torch.cat((first + offsets, (num_columns - ARGMAX_BLOCK + offsets).expand(len(z), -1)), dim=-1)
    return candidates.gather(-1, z.gather(-1, candidates).argmax(-1, keepdim=True))


def _divergence(
    problem: Problem, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, form_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence of each row (r,) and its derivative by log q (r, K), None where no gradient flows."""
    divergence = problem.divergence
    form_gradients = form_gradients and problem.kd_weight != 0.0
    if divergence.is_pointwise():
        f, g = divergence.terms(p, q, log_p, log_q)
        return f.sum(-1), g if form_gradients else None
    if not form_gradients:
        return divergence.rows(log_p, log_q), None
    with torch.enable_grad():
        leaf = log_q.detach().requires_grad_()
        kd = divergence.rows(log_p, leaf)
        (g,) = torch.autograd.grad(kd.sum(), leaf)
    return kd.detach(), g
