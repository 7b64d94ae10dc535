"""A head cut by tokens over the ranks of a process group: which part of it a rank has, and whether the parts fit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class VocabParallel:
    """Where this rank's rows of both heads lie in the vocabulary, and who has the others.

    Every rank of the group gives the same rows of hidden states, labels and weights, and its own part of each head, which
    follows the part of the rank before it. Parts may differ in size, and be empty.

    Args:
        group: the ranks that share the heads.
        start: token id of the first row of this rank's student_weight, and of its teacher_weight.
        reduce_input_grad: sum student_input's gradient over the group. False leaves the part that comes from this rank's
            tokens, for a caller who sums it himself, as one does who gathered the rows and scatters the sum.
    """

    group: dist.ProcessGroup
    start: int
    reduce_input_grad: bool = True

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Every rank's values, of one shape, stacked in the order of the ranks."""
        gathered = values.new_empty((self.group.size(), *values.shape))
        dist.all_gather(list(gathered.unbind()), values.contiguous(), group=self.group)
        return gathered


def check_parts(
    parallel: VocabParallel, num_student: int, num_teacher: int, vocab_size: int | None, device: torch.device
) -> int:
    """Compare the parts of all ranks; returns the tokens of the student's whole head. Every rank raises, or none.

    Args:
        num_student, num_teacher: rows of this rank's weights; equal without a teacher.
        vocab_size: compared tokens of the whole heads.
    """
    parts = parallel.gather(torch.tensor([parallel.start, num_student, num_teacher], device=device)).tolist()
    expected = 0
    for rank, (start, student, _) in enumerate(parts):
        if start != expected:
            raise ValueError(
                f"vocab_parallel: expected rank {rank}'s part to start at token {expected}, where the one before it ends, "
                f"got {start}; cut student_weight into parts that follow one another in the order of the ranks"
            )
        expected += student
    if vocab_size is not None and not 1 <= vocab_size <= expected:
        raise ValueError(
            f"vocab_size: expected 1 to {expected}, the tokens of all ranks' student_weight, got {vocab_size}"
        )
    for rank, (start, student, teacher) in enumerate(parts):
        compared = student if vocab_size is None else max(0, min(student, vocab_size - start))
        if teacher < compared or (vocab_size is None and teacher > compared):
            raise ValueError(
                f"teacher_weight: expected {compared} tokens from token {start} on in rank {rank} (student_weight), got "
                f"{teacher}; cut both heads at the same tokens, and pass vocab_size=<tokens both share> if one is padded"
            )
    return expected
