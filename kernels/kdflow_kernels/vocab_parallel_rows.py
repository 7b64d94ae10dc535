"""The row step in torch where every rank has the logits of its own tokens alone.

A chunk of rows costs two collectives. What each rank finds in its columns (maximum and sum of exponentials of every
softmax, the label's logit) is gathered, which makes the softmaxes whole; then the sums over the vocabulary of the
divergence, of its gradient and of the entropies are reduced. Log-probabilities are formed anew for each use, so that no
more than a step's rows are held in fp32.

Shape suffixes: R ranks, n rows of a chunk, r rows of a step, V columns of this rank, the K compared ones first.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdflow_kernels.problem import Problem, RowTerms
from kdflow_kernels.tiled_logits import Blocks
from kdflow_kernels.torch_rows import TorchRows, argmax, divergence_terms, logits_gradient


class _Softmax(NamedTuple):
    """What makes logits x log-probabilities: (x - maximum) - log_sum, two numbers, as their sum would round to the digits
    that large logits leave it; each (n,)."""

    maximum: Tensor
    log_sum: Tensor  # of exp(x - maximum)

    def log_probs(self, x: Tensor, rows: slice) -> Tensor:
        return (x - self.maximum[rows].unsqueeze(-1)).sub_(self.log_sum[rows].unsqueeze(-1))


class _Normalisers(NamedTuple):
    """Of a chunk's rows over all ranks' columns, each (n,)."""

    student: _Softmax  # of the compared logits / T
    teacher: _Softmax
    whole: _Softmax  # of the student's whole head
    label_logit: Tensor  # NaN where no rank has the label
    agreement: Tensor  # 1 where both sides' likeliest compared token, of equal ones the first, is the same


class VocabParallelRows(TorchRows):
    """The row step for chunks of a group of rows, whose logits of this rank's columns lie in blocks."""

    def __init__(self, problem: Problem, labels: Tensor | None, blocks: Blocks, terms: RowTerms, form_gradients: bool):
        """labels (N,) are tokens of the whole vocabulary."""
        super().__init__(problem, labels, blocks, terms, form_gradients)
        assert problem.vocab_parallel is not None
        self.parallel, self.owned = problem.vocab_parallel, None
        if labels is not None:
            columns = labels - self.parallel.start
            self.owned = (columns >= 0) & (columns < blocks.num_columns)
            self.labels = columns.masked_fill(~self.owned, 0)

    def run(self, group_start: int, chunk: slice) -> None:
        size = len(self.z)
        steps = [slice(start, min(start + size, chunk.stop)) for start in range(chunk.start, chunk.stop, size)]
        rows = slice(group_start + chunk.start, group_start + chunk.stop)
        found = [self._statistics(group_start, chunk.start, step) for step in steps]
        normalisers = self._normalisers(self.parallel.gather(torch.cat(found, dim=1)))
        sums = torch.cat([self._sums(normalisers, chunk.start, step) for step in steps], dim=1)
        dist.all_reduce(sums, group=self.parallel.group)
        kd, gradient_sum, terms = sums[0], sums[1], self.terms
        for place, values in (
            (terms.kd, kd),
            (terms.ce, normalisers.whole.log_sum - (normalisers.label_logit - normalisers.whole.maximum)),
            (terms.student_entropy, sums[2]),
            (terms.teacher_entropy, sums[3]),
            (terms.top1_agreement, normalisers.agreement),
        ):
            if place is not None:
                place[rows] = values
        if self.form_gradients and self.blocks.num_columns:
            for step in steps:
                self._write(self._gradient(normalisers, gradient_sum, group_start, chunk.start, step), step)

    def _statistics(self, group_start: int, chunk_start: int, step: slice) -> Tensor:
        """What this rank knows of the rows, (11, r): see _normalisers."""
        z, teacher_z = self._logits(chunk_start, step)
        problem, start = self.problem, self.parallel.start
        compared = self._scaled(z[:, : problem.num_compared])
        of_student = _softmax_parts(compared, start)
        of_teacher = of_whole = torch.zeros_like(of_student)
        if teacher_z is not None:
            of_teacher = _softmax_parts(self._scaled(teacher_z), start)
        label = torch.zeros_like(of_student[:2])
        if self.labels is not None and self.owned is not None:
            same = problem.temperature == 1.0 and compared.shape == z.shape
            of_whole = of_student if same else _softmax_parts(z, start)
            rows = slice(group_start + step.start, group_start + step.stop)
            if z.shape[1]:
                owned = self.owned[rows].to(z.dtype)
                label = torch.stack((z.gather(-1, self.labels[rows].unsqueeze(-1)).squeeze(-1) * owned, owned))
        return torch.cat((of_student, of_teacher, of_whole, label))

    def _normalisers(self, gathered: Tensor) -> _Normalisers:
        """From all ranks' statistics, (R, 11, n)."""
        student, student_top = _merge(gathered[:, 0:3])
        teacher, teacher_top = _merge(gathered[:, 3:6])
        whole, _ = _merge(gathered[:, 6:9])
        label_logit, num_owners = gathered[:, 9:11].sum(0)
        label_logit = label_logit.masked_fill(num_owners != 1.0, float("nan"))
        return _Normalisers(student, teacher, whole, label_logit, (student_top == teacher_top).to(label_logit.dtype))

    def _probabilities(self, normalisers: _Normalisers, chunk_start: int, step: slice):
        """z (r, V), log q and log p (r, K); log p is None without a teacher."""
        z, teacher_z = self._logits(chunk_start, step)
        in_chunk = slice(step.start - chunk_start, step.stop - chunk_start)
        log_q = normalisers.student.log_probs(self._scaled(z[:, : self.problem.num_compared]), in_chunk)
        log_p = None
        if teacher_z is not None:
            log_p = normalisers.teacher.log_probs(self._scaled(teacher_z), in_chunk)
        return z, log_q, log_p

    def _sums(self, normalisers: _Normalisers, chunk_start: int, step: slice) -> Tensor:
        """This rank's part of the divergence, of the sum of its gradient, and of both entropies, (4, r)."""
        _, log_q, log_p = self._probabilities(normalisers, chunk_start, step)
        q = log_q.exp()
        sums = torch.zeros((4, len(q)), dtype=q.dtype, device=q.device)
        sums[2] = -torch.linalg.vecdot(q, log_q)
        if log_p is not None:
            p = log_p.exp()
            sums[0], g = divergence_terms(self.problem, p, q, log_p, log_q, self.form_gradients)
            if g is not None:
                sums[1] = g.sum(-1)
            sums[3] = -torch.linalg.vecdot(p, log_p)
        return sums

    def _gradient(
        self, normalisers: _Normalisers, gradient_sum: Tensor, group_start: int, chunk_start: int, step: slice
    ) -> Tensor:
        z, log_q, log_p = self._probabilities(normalisers, chunk_start, step)
        in_chunk = slice(step.start - chunk_start, step.stop - chunk_start)
        rows = slice(group_start + step.start, group_start + step.stop)
        q, g, ce_probs, labels, owned = log_q.exp(), None, None, None, None
        if log_p is not None:
            _, g = divergence_terms(self.problem, log_p.exp(), q, log_p, log_q, True)
        if self.problem.ce_weight != 0.0 and self.labels is not None and self.owned is not None:
            ce_probs = normalisers.whole.log_probs(z, in_chunk).exp_()
            labels, owned = self.labels[rows], self.owned[rows]
        return logits_gradient(
            self.problem,
            z,
            q,
            g,
            gradient_sum[in_chunk],
            ce_probs,
            labels,
            self.problem.row_scale[rows],
            owned=owned,
        )

    def _scaled(self, z: Tensor) -> Tensor:
        return z if self.problem.temperature == 1.0 else z / self.problem.temperature


def _softmax_parts(x: Tensor, start: int) -> Tensor:
    """Maximum, sum of exp(x - maximum) and the maximum's first token, of this rank's columns, (3, r)."""
    if x.shape[1] == 0:
        return torch.stack((x.new_full((len(x),), -torch.inf), x.new_zeros(len(x)), x.new_zeros(len(x))))
    top = argmax(x)
    maximum = x.gather(-1, top)
    return torch.stack((maximum.squeeze(-1), (x - maximum).exp_().sum(-1), (top.squeeze(-1) + start).to(x.dtype)))


def _merge(parts: Tensor) -> tuple[_Softmax, Tensor]:
    """The softmax over all ranks and the maximum's first token, from _softmax_parts of each, (R, 3, n)."""
    maxima, sums, tops = parts.unbind(1)
    maximum = maxima.amax(0)
    first = (maxima == maximum).to(torch.int8).argmax(0)
    total = (sums * (maxima - maximum).exp()).sum(0)
    return _Softmax(maximum, total.log()), tops.gather(0, first.unsqueeze(0)).squeeze(0)
