"""What a backend is given and what it returns.

Shape suffixes: N rows that enter the loss, V columns of a head (of this rank's part, where it is cut), K columns the divergence compares, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdflow_kernels.divergences import Divergence
from kdflow_kernels.vocab_parallel import VocabParallel

# A bias of -inf masks a token. This low its probability is 0 and its log-probability still a number, so that
# 0 * log-probability is 0.
LOWEST_LOGIT = -1e30


@dataclass(frozen=True)
class Head:
    """One side's last hidden states and output head: logits = softcap(logit_scale * (input @ weight.T + bias)).

    ``token_ids`` (K,) are the columns the divergence compares, in the order of the other side's; None: the first K.
    """

    input: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None
    token_ids: Tensor | None

    @property
    def is_plain(self) -> bool:
        return self.bias is None and self.logit_scale == 1.0 and self.softcap is None


@dataclass(frozen=True)
class Problem:
    """Validated inputs of one loss, reduced to the rows that count."""

    student: Head
    teacher: Head | None  # None: cross-entropy alone
    labels: Tensor | None  # (N,) int64, tokens of the student's whole head; None: no cross-entropy
    row_scale: Tensor  # (N,) fp32 or fp64: row weight / denominator, what each row's loss is multiplied by
    num_compared: int  # K
    divergence: Divergence
    temperature: float
    kd_weight: float
    ce_weight: float
    chunk_size: int | None
    grad_filter_eps: float
    vocab_parallel: VocabParallel | None = None  # None: both heads are whole


@dataclass(frozen=True)
class RowTerms:
    """Per-row results, each (N,), in nats, before weights and row_scale; None where there is no teacher or no label."""

    kd: Tensor | None
    ce: Tensor | None
    student_entropy: Tensor
    teacher_entropy: Tensor | None
    top1_agreement: Tensor | None

    @classmethod
    def empty(cls, problem: Problem, dtype: torch.dtype) -> RowTerms:
        def make() -> Tensor:
            return torch.empty_like(problem.row_scale, dtype=dtype, memory_format=torch.contiguous_format)

        has_teacher = problem.teacher is not None
        return cls(
            kd=make() if has_teacher else None,
            ce=None if problem.labels is None else make(),
            student_entropy=make(),
            teacher_entropy=make() if has_teacher else None,
            top1_agreement=make() if has_teacher else None,
        )


@dataclass(frozen=True)
class GradientNeeds:
    input: bool
    weight: bool
    bias: bool

    def __bool__(self) -> bool:
        return self.input or self.weight or self.bias


@dataclass(frozen=True)
class Gradients:
    """d(sum_n row_scale_n * (kd_weight * kd_n + ce_weight * ce_n)) for the student's tensors; None where not needed."""

    input: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
