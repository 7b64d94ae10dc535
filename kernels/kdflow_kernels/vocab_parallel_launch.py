"""Launches the row kernel where every rank has the logits of its own tokens alone.

What each rank finds of its columns is gathered, which makes the softmaxes whole; then the sums over the vocabulary are
reduced: of df/dlog q before the gradient is written, unless that is known, and of the divergence with it or after.

Shape suffixes: R ranks, c rows of a chunk.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kdflow_kernels.problem import Problem, RowTerms
from kdflow_kernels.registers import launch
from kdflow_kernels.row_launch import RowLauncher, on
from kdflow_kernels.vocab_parallel import VocabParallel

NO_GRADIENT = {"KD_GRADIENT": False, "CE_GRADIENT": False, "FILTER": False}
NO_DIVERGENCE = {"POINTWISE": None, "GRADIENT_SUM": None}


class VocabParallelLauncher(RowLauncher):
    """The problem's labels are columns of this rank: see with_own_labels."""

    def launch(
        self, chunk: slice, student_logits: Tensor, teacher_logits: Tensor | None, gradient: Tensor, terms: RowTerms
    ) -> None:
        from kdflow_kernels.row_kernels import row_kernel

        num_rows = chunk.stop - chunk.start
        sources = self._sources(num_rows, student_logits, teacher_logits)
        whole = {**sources, **self._of_rows(chunk, gradient, terms)}

        def run(changed: dict[str, Any]) -> None:
            if self.num_columns:
                with on(self.row_scale.device):
                    launch(row_kernel, self._grid(chunk), {**whole, **changed})

        own = self.row_scale.new_zeros((11, num_rows))
        own[0:9:4] = -torch.inf  # what a rank without columns says
        run({"STAGE": "own", "statistics": own, **NO_GRADIENT, **NO_DIVERGENCE})
        given = self._whole(chunk, own, terms)
        of_given = {"STAGE": "given", "statistics": given}
        kd, group = torch.zeros_like(given[0]), self._parallel().group
        sum_known = whole["KD_GRADIENT"] and whole["GRADIENT_SUM"] is not None
        if self.pointwise is not None and not sum_known:
            run({**of_given, **NO_GRADIENT, "GRADIENT_SUM": None, "kd": kd})
            sums = torch.stack((kd, given[6]))
            dist.all_reduce(sums, group=group)
            assert terms.kd is not None
            terms.kd[chunk], given[6] = sums
        if whole["KD_GRADIENT"]:
            run({**of_given, "kd": kd})
        elif whole["CE_GRADIENT"]:
            run({**of_given, **NO_DIVERGENCE})
        if sum_known:
            dist.all_reduce(kd, group=group)
            assert terms.kd is not None
            terms.kd[chunk] = kd

    def _whole(self, chunk: slice, own: Tensor, terms: RowTerms) -> Tensor:
        """The statistics of all columns, (7, c), as row_kernel takes them; writes the terms that follow from them."""
        parallel, labels = self._parallel(), self.problem.labels
        owned = torch.zeros_like(own[0]) if labels is None else (labels[chunk] >= 0).to(own.dtype)
        own[3:8:4] += parallel.start
        gathered = parallel.gather(torch.cat((own, owned.unsqueeze(0))))
        temperature = self.problem.temperature
        top_s, log_sum_s, entropy_s, first_s = _merge(gathered[:, 0:4], temperature)
        top_t, log_sum_t, entropy_t, first_t = _merge(gathered[:, 4:8], temperature)
        top_z, log_sum_z = _merge_sums(gathered[:, 8:10], 1.0)[:2]
        terms.student_entropy[chunk] = entropy_s
        if terms.teacher_entropy is not None and terms.top1_agreement is not None:
            terms.teacher_entropy[chunk] = entropy_t
            terms.top1_agreement[chunk] = (first_s == first_t).to(own.dtype)
        if terms.ce is not None:
            label_logits, owners = gathered[:, 10], gathered[:, 11]
            label_logit = torch.where(owners > 0.0, label_logits, 0.0).sum(0)
            label_logit = label_logit.masked_fill(owners.sum(0) != 1.0, float("nan"))
            terms.ce[chunk] = log_sum_z - (label_logit - top_z)
        return torch.stack((top_s, log_sum_s, top_t, log_sum_t, top_z, log_sum_z, torch.zeros_like(top_s)))

    def _parallel(self) -> VocabParallel:
        assert self.problem.vocab_parallel is not None
        return self.problem.vocab_parallel


def with_own_labels(problem: Problem, num_columns: int) -> Problem:
    """Labels as columns of this rank, -1 where another has them."""
    if problem.labels is None or problem.vocab_parallel is None:
        return problem
    columns = problem.labels - problem.vocab_parallel.start
    return dataclasses.replace(problem, labels=columns.masked_fill((columns < 0) | (columns >= num_columns), -1))


def _merge_sums(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum and log of the sum of whole rows, (c,), and the ranks' shares of it, (R, c), from each rank's, (R, 2, c)."""
    tops, log_sums = parts.unbind(1)
    top = tops.amax(0)
    logs = log_sums + (tops - top) / temperature
    log_sum = logs.logsumexp(0)
    return top, log_sum, (logs - log_sum).exp()


def _merge(parts: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Maximum, log of the sum, entropy and the maximum's first token of whole rows, from each rank's, (R, 4, c)."""
    top, log_sum, shares = _merge_sums(parts[:, :2], temperature)
    entropy = (torch.special.entr(shares) + shares * parts[:, 2]).sum(0)
    first = (parts[:, 0] == top).to(torch.int8).argmax(0, keepdim=True)
    return top, log_sum, entropy, parts[:, 3].gather(0, first).squeeze(0)
