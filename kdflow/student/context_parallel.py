"""Context parallelism of the student: ranks that share each microbatch, cut along its tokens.

The ranks of a group are neighbours: with groups of c, ranks c * i to c * i + c - 1 get data rank i's microbatches.
Sharding spans them as it does all others. Each has a part of the loss rows, and divides by the step's loss tokens.

Shapes: N loss rows of the microbatch, n of this rank, t tokens of this rank, Ht the teacher's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from kdflow.errors import ConfigError
from kdflow.modeling import ContextKeys, ContextSplit, to_device
from kdflow.student.rows import TeacherRows
from kdflow.types import Microbatch

_ROPES = {"dynamic", "longrope"}


@dataclass(frozen=True)
class StudentInput:
    """What a rank computes of a microbatch.

    Attributes:
        input_ids, position_ids: (t,) int64.
        rows: (n,) int64, which of its tokens are loss rows.
        shift_labels: (n,) int64, the token that each of them predicts.
        which: (n,) int64, the same rows among the microbatch's N; None: all of them.
        context: brings the keys of the other ranks; None where the rank has the microbatch whole.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    rows: torch.Tensor
    shift_labels: torch.Tensor
    which: torch.Tensor | None = None
    context: ContextKeys | None = None

    @staticmethod
    def whole(microbatch: Microbatch, device: torch.device) -> StudentInput:
        return StudentInput(
            input_ids=to_device(microbatch.input_ids, device).long(),
            position_ids=to_device(microbatch.position_ids(), device),
            rows=to_device(microbatch.loss_rows, device).long(),
            shift_labels=to_device(microbatch.shift_labels(), device),
        )


class ContextParallel:
    """This rank's place among those that share its microbatches.

    Args:
        size: ranks of a group; every rank of the run makes one.
        model_config: of the student.
        device: of this rank.

    Raises:
        ConfigError: the model turns its positions by the length of what it is given.
    """

    def __init__(self, size: int, model_config: Any, device: torch.device) -> None:
        num_ranks = dist.get_world_size()
        check_model(model_config)
        self._device = device
        self._first = dist.get_rank() // size * size
        for first in range(0, num_ranks, size):  # every rank makes all groups
            group = dist.new_group(list(range(first, first + size)))
            if first == self._first:
                assert isinstance(group, dist.ProcessGroup)
                self._group = group

    def part(self, microbatch: Microbatch) -> StudentInput:
        """This rank's part."""
        device = self._device
        split = ContextSplit.of(microbatch.sequence_lengths, self._group.rank(), self._group.size())
        which, rows = split.loss_rows(microbatch.loss_rows)
        return StudentInput(
            input_ids=to_device(microbatch.input_ids[split.tokens], device).long(),
            position_ids=to_device(microbatch.position_ids()[split.tokens], device),
            rows=to_device(rows.astype(np.int64), device),
            shift_labels=to_device(microbatch.shift_labels()[which], device),
            which=to_device(which, device),
            context=ContextKeys(split, self._group, device),
        )

    def teacher_rows(self, rows: TeacherRows, num_rows: int, hidden_size: int, dtype: torch.dtype) -> torch.Tensor:
        """The microbatch's (N, Ht), which the first rank of the group alone asks for."""
        received = torch.empty((num_rows, hidden_size), dtype=dtype, device=self._device)
        if dist.get_rank() == self._first:
            received = rows().contiguous()
        if received.numel():
            dist.broadcast(received, src=self._first, group=self._group)
        return received


def check_model(model_config: Any) -> None:
    """Raises ConfigError where the turn of a position depends on what else a rank has."""
    values = model_config.get_text_config().to_dict()
    ropes = [values.get("rope_parameters"), values.get("rope_scaling")]
    ropes += [inner for rope in ropes if isinstance(rope, dict) for inner in rope.values()]
    kinds = {str(rope.get("rope_type", rope.get("type"))) for rope in ropes if isinstance(rope, dict)} & _ROPES
    if kinds:
        raise ConfigError(
            f"student.context_parallel: this student's rotary embeddings are {', '.join(kinds)}, which depend on the "
            "longest position of a batch, and ranks have different ones; set it to 1"
        )
