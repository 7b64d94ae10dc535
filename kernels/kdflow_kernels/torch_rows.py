"""The row step in torch: from a block of whole rows of logits to the rows' terms and dloss/dlogits.

Works on a few rows at a time, so that a handful of (rows, V) buffers stay in the processor's cache. Softmax and all sums
are in fp32 (fp64 for fp64 inputs).
"""

from dataclasses import fields

import torch
from torch import Tensor

from kdflow_kernels import tiled_logits
from kdflow_kernels.divergences import rows_of, terms_of
from kdflow_kernels.problem import Problem, RowTerms
from kdflow_kernels.tiled_logits import Blocks

# Numbers in a buffer of the row step, per thread: about eight such buffers should fit in the thread's share of cache.
ROW_STEP_NUMBERS = 2**18

# Argmax in torch does not vectorise on CPU (2.3 ns a number where a maximum takes 0.1): take maxima of blocks, then look
# into one block.
ARGMAX_BLOCK = 128


class TorchRows:
    """The row step for chunks of a group of rows whose logits lie in blocks."""

    def __init__(self, problem: Problem, labels: Tensor | None, blocks: Blocks, terms: RowTerms, form_gradients: bool):
        """labels (N,) are column numbers; what is found of each row is written to its place in terms."""
        self.problem, self.labels, self.blocks, self.terms = problem, labels, blocks, terms
        self.form_gradients = form_gradients
        device, dtype = problem.row_scale.device, torch.promote_types(problem.student.weight.dtype, torch.float32)
        step_rows = max(1, ROW_STEP_NUMBERS * torch.get_num_threads() // max(1, blocks.num_columns))
        self.z = torch.empty((step_rows, blocks.num_columns), dtype=dtype, device=device)

    def run(self, group_start: int, chunk: slice) -> None:
        """Rows chunk of the group, whose first row is row group_start of the problem.

        The student's logits become dloss/dlogits in place where gradients are formed.
        """
        for start in range(chunk.start, chunk.stop, len(self.z)):
            self._step(group_start, chunk.start, slice(start, min(start + len(self.z), chunk.stop)))

    def _step(self, group_start: int, chunk_start: int, in_group: slice) -> None:
        z, teacher_z = self._logits(chunk_start, in_group)
        rows = slice(group_start + in_group.start, group_start + in_group.stop)
        terms, gradient = step(
            self.problem,
            z,
            teacher_z,
            None if self.labels is None else self.labels[rows],
            self.problem.row_scale[rows],
            form_gradients=self.form_gradients,
        )
        if gradient is not None:
            self._write(gradient, in_group)
        # Copied at once: small tensors that outlive a step would keep its large ones from being allocated anew in the
        # same place (646 MiB instead of 157 MiB at N=1024, V=64000).
        for field in fields(RowTerms):
            found = getattr(terms, field.name)
            if found is not None:
                getattr(self.terms, field.name)[rows] = found

    def _logits(self, chunk_start: int, in_group: slice) -> tuple[Tensor, Tensor | None]:
        """(r, V) of the student, valid until the next call, and (r, K) of the teacher."""
        blocks = self.blocks
        z = self.z[: in_group.stop - in_group.start]
        for span in blocks.spans:
            span.columns(z).copy_(span.rows(in_group))
        _add_maxima(z, blocks.student_maxima, in_group)
        teacher_z = None
        if blocks.teacher_rows is not None:
            in_chunk = slice(in_group.start - chunk_start, in_group.stop - chunk_start)
            teacher_z = blocks.teacher_rows[in_chunk].to(z.dtype)
            _add_maxima(teacher_z, blocks.teacher_maxima, in_chunk)
        return z, teacher_z

    def _write(self, gradient: Tensor, in_group: slice) -> None:
        """Puts dloss/dlogits in the place of the student's logits; columns that it lacks are zero."""
        num_columns = self.blocks.num_columns
        if gradient.shape[1] < num_columns:
            gradient = torch.nn.functional.pad(gradient, (0, num_columns - gradient.shape[1]))
        for span in self.blocks.spans:
            span.rows(in_group).copy_(span.columns(gradient))


def _add_maxima(z: Tensor, maxima: Tensor | None, rows: slice) -> None:
    """Undo write_logits's subtraction in whole rows z (r, V)."""
    if maxima is None:
        return
    per_tile = maxima[:, rows].T.unsqueeze(-1)  # (r, tiles, 1)
    num_full = z.shape[1] // tiled_logits.TILE_COLUMNS
    full = num_full * tiled_logits.TILE_COLUMNS
    z[:, :full].unflatten(-1, (num_full, tiled_logits.TILE_COLUMNS)).add_(per_tile[:, :num_full])
    if full < z.shape[1]:
        z[:, full:].add_(per_tile[:, -1])


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
        kd, g = divergence_terms(problem, p, q, log_p, log_q, form_gradients)

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

    gradient_sum = None if g is None else g.sum(-1)
    return terms, logits_gradient(problem, student_logits, q, g, gradient_sum, ce_probs, labels, row_scale)


def logits_gradient(
    problem: Problem,
    student_logits: Tensor,
    q: Tensor,
    g: Tensor | None,
    gradient_sum: Tensor | None,
    ce_probs: Tensor | None,
    labels: Tensor | None,
    row_scale: Tensor,
    *,
    owned: Tensor | None = None,
) -> Tensor:
    """d(row_scale * row loss)/d(logits before scale and softcap), (r, V) or (r, K), in the memory of ce_probs or q.

    Shapes: q and g = df/dlog q (r, K), g None where no gradient comes from the divergence; gradient_sum (r,), g's sum
    over the vocabulary; ce_probs (r, V), the softmax of cross-entropy, None where it is q; owned (r,) bool, rows whose
    label is among the columns, None: all.
    """
    K = problem.num_compared
    ce_scale = None if problem.ce_weight == 0.0 else (problem.ce_weight * row_scale).unsqueeze(-1)
    q_scale = torch.zeros_like(row_scale).unsqueeze(-1) if ce_scale is None or ce_probs is not None else ce_scale
    gradient = q
    if g is not None and gradient_sum is not None:
        # d/dz = (g - q sum g) / T. The difference comes first, being small beside its parts where a row is peaked.
        kd_scale = (problem.kd_weight / problem.temperature * row_scale).unsqueeze(-1)
        of_ce = gradient * q_scale if problem.ce_weight != 0.0 and ce_probs is None else None
        gradient.mul_(-gradient_sum.unsqueeze(-1)).add_(g).mul_(kd_scale)
        if of_ce is not None:
            gradient += of_ce
    else:
        gradient.mul_(q_scale)
    if ce_scale is not None and labels is not None:
        if ce_probs is not None:
            ce_probs.mul_(ce_scale)
            ce_probs[:, :K] += gradient
            gradient = ce_probs
        label_scale = ce_scale if owned is None else ce_scale * owned.unsqueeze(-1)
        gradient.scatter_add_(-1, labels.unsqueeze(-1), -label_scale)
    student = problem.student
    if student.softcap is not None:
        capped = student_logits[:, : gradient.shape[1]] / student.softcap
        gradient.mul_(1.0 - capped.square_())
    if student.logit_scale != 1.0:
        gradient.mul_(student.logit_scale)
    return gradient


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and log-probabilities (r, V) and the most likely column (r, 1)."""
    probs = torch.softmax(z, dim=-1)
    top = argmax(z)
    # softmax is exp(z - log_sum), so its value at one column gives log_sum without another pass.
    log_sum = z.gather(-1, top) - probs.gather(-1, top).log()
    return probs, z - log_sum, top


def argmax(z: Tensor) -> Tensor:
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


def divergence_terms(
    problem: Problem, p: Tensor, q: Tensor, log_p: Tensor, log_q: Tensor, form_gradients: bool
) -> tuple[Tensor, Tensor | None]:
    """The divergence of each row (r,) and its derivative by log q (r, K), None where no gradient flows."""
    divergence = problem.divergence
    form_gradients = form_gradients and problem.kd_weight != 0.0
    if divergence.is_pointwise():
        f, g = terms_of(divergence, p, q, log_p, log_q)
        return f.sum(-1), g if form_gradients else None
    if not form_gradients:
        return rows_of(divergence, log_p, log_q), None
    with torch.enable_grad():
        leaf = log_q.detach().requires_grad_()
        kd = rows_of(divergence, log_p, leaf)
        (g,) = torch.autograd.grad(kd.sum(), leaf)
    return kd.detach(), g
