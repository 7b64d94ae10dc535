"""What a distillation algorithm is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from kdflow.config import AlgorithmConfig
from kdflow.registry import Registry
from kdflow.types import LossRows
from kdflow_kernels import KDLossOutput, VocabParallel


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model before it is loaded.

    Attributes:
        name: folder or hub id.
        vocab: token -> id of its tokenizer.
        vocab_size: rows of its head; at least as many as the tokenizer's ids, the rest is padding.
    """

    name: str
    vocab: Mapping[str, int]
    vocab_size: int


class Algorithm(Protocol):
    """Turns the hidden states of both sides into a loss.

    Attributes:
        uses_teacher: whether it needs a teacher's hidden states. Without, `teacher` is None in the constructor, no
            teacher is started, and the teacher's rows in `loss` and `evaluate` have no columns.
    """

    uses_teacher: ClassVar[bool]

    def __init__(self, config: AlgorithmConfig, *, student: ModelInfo, teacher: ModelInfo | None) -> None:
        """Checks that the pair fits the algorithm.

        Raises:
            ConfigError: it does not.
        """
        ...

    @property
    def needs_whole_rows(self) -> str:
        """What needs all logits of a row in one place, so that heads cannot be cut over ranks; or nothing."""
        ...

    def loss(
        self,
        student: LossRows,
        teacher: LossRows,
        shift_labels: torch.Tensor,
        *,
        num_items: float,
    ) -> KDLossOutput:
        """The training loss of a microbatch, differentiable in the student's side.

        Args:
            shift_labels: (N,) int64, the token after each row.
            num_items: sums over rows are divided by it.
        """
        ...

    def evaluate(
        self,
        student: LossRows,
        teacher: LossRows,
        shift_labels: torch.Tensor,
        *,
        num_items: float,
    ) -> KDLossOutput:
        """KL(teacher || student) in `kd_loss` (NaN without a teacher) and cross-entropy in `ce_loss`."""
        ...


def side_arguments(side: str, rows: LossRows) -> dict[str, Any]:
    """What fused_kd_loss is told of "student" or "teacher"; the student's head says how both are cut over ranks."""
    head = rows.head
    arguments: dict[str, Any] = {
        f"{side}_input": rows.hidden,
        f"{side}_weight": head.weight,
        f"{side}_bias": head.bias,
        f"{side}_logit_scale": head.logit_scale,
        f"{side}_softcap": head.softcap,
    }
    if head.vocab_group is not None:
        arguments["vocab_parallel"] = VocabParallel(head.vocab_group, head.vocab_start, reduce_input_grad=False)
    return arguments


ALGORITHMS: Registry[type[Algorithm]] = Registry(
    "algorithm", {"sft": "kdflow.algorithms.sft", "vanilla": "kdflow.algorithms.vanilla"}
)
