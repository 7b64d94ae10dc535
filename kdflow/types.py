"""The nouns of kdflow.

Shapes: T tokens of a microbatch (all samples one after another, no padding), B samples,
N loss rows (positions whose next token counts in the loss), H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation.

    Attributes:
        input_ids: (T,) int32.
        loss_mask: (T,) bool; true where the token counts in the loss.
        sample_id: its row, counted on over the sources of a run.
        teacher: the conversation as the teacher alone reads it, with other tokens around the same loss tokens; None
            where both read the same.
        teacher_name: which teacher it learns from; empty where there is one alone.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    sample_id: int
    teacher: Sample | None = None
    teacher_name: str = ""

    def __len__(self) -> int:
        return len(self.input_ids)

    def for_teacher(self) -> Sample:
        return self if self.teacher is None else replace(self.teacher, teacher_name=self.teacher_name)

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return max(len(self), len(self.for_teacher()))

    @property
    def num_loss_tokens(self) -> int:
        # The first token has no predecessor to predict it.
        return int(self.loss_mask[1:].sum())


@dataclass(frozen=True)
class Microbatch:
    """Samples packed without padding, with the rows that enter the loss.

    Attributes:
        input_ids: (T,) int32, the samples one after another.
        sequence_lengths: length of each sample; they add up to T.
        loss_rows: (N,) int32, ascending positions t whose next token counts in the loss.
        sample_ids: which samples these are.
        teacher: what the teacher reads in their place, with as many loss rows in the same order; None where it reads
            the same.
        teacher_name: which teacher they all learn from.
    """

    input_ids: np.ndarray
    sequence_lengths: tuple[int, ...]
    loss_rows: np.ndarray
    sample_ids: tuple[int, ...] = ()
    teacher: Microbatch | None = None
    teacher_name: str = ""

    @staticmethod
    def pack(samples: Sequence[Sample]) -> Microbatch:
        """Concatenates samples of one teacher; a row never predicts the first token of the next sample."""
        (teacher_name,) = {s.teacher_name for s in samples}
        rows, start = [], 0
        for sample in samples:
            rows.append(start + np.flatnonzero(sample.loss_mask[1:]))
            start += len(sample)
        own_context = any(s.teacher is not None for s in samples)
        return Microbatch(
            input_ids=np.concatenate([s.input_ids for s in samples]).astype(np.int32),
            sequence_lengths=tuple(len(s) for s in samples),
            loss_rows=np.concatenate(rows).astype(np.int32),
            sample_ids=tuple(s.sample_id for s in samples),
            teacher=Microbatch.pack([s.for_teacher() for s in samples]) if own_context else None,
            teacher_name=teacher_name,
        )

    def without_loss(self) -> Microbatch:
        """The same tokens, none of which enters the loss."""
        return replace(self, loss_rows=np.zeros(0, np.int32), sample_ids=(), teacher=None)

    def for_teacher(self) -> Microbatch:
        """What the teacher is asked for: row i of the answer belongs to loss row i."""
        return self.teacher or self

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_loss_tokens(self) -> int:
        return len(self.loss_rows)

    def position_ids(self) -> np.ndarray:
        """(T,) int64, counting from 0 in each sample."""
        return np.concatenate([np.arange(n, dtype=np.int64) for n in self.sequence_lengths])

    def shift_labels(self) -> np.ndarray:
        """(N,) int64, the token that each loss row predicts."""
        return self.input_ids[self.loss_rows + 1].astype(np.int64)


@dataclass(frozen=True)
class LMHead:
    """A language-model head: logits = softcap(logit_scale * (hidden @ weight.T + bias)).

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        logit_scale: factor of the logits.
        softcap: c of c * tanh(logits / c), or None.
        vocab_start: token of the first row, where this is a rank's part of a head.
        vocab_group: the ranks that have the other parts; None: the head is whole.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_start: int = 0
    vocab_group: ProcessGroup | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    def to(self, device: torch.device) -> LMHead:
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)


@dataclass(frozen=True)
class LossRows:
    """One side of the loss.

    Attributes:
        hidden: (N, H) last hidden states at the positions that predict.
        head: turns them into logits.
    """

    hidden: torch.Tensor
    head: LMHead
