"""Distillation of models that share a vocabulary: one divergence over all of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from kdflow.algorithms.base import ALGORITHMS, ModelInfo, side_arguments
from kdflow.config import AlgorithmConfig
from kdflow.errors import ConfigError
from kdflow.types import LossRows
from kdflow_kernels import ForwardKL, KDLossOutput, fused_kd_loss, get_divergence


@ALGORITHMS.register("vanilla")
class Vanilla:
    """kd_weight * divergence(teacher, student) + ce_weight * cross-entropy, averaged over tokens."""

    uses_teacher: ClassVar[bool] = True

    def __init__(self, config: AlgorithmConfig, *, student: ModelInfo, teacher: ModelInfo | None) -> None:
        assert teacher is not None
        if config.kd_weight == config.ce_weight == 0.0:
            raise ConfigError("algorithm: expected kd_weight or ce_weight above 0, got 0 for both; nothing would train")
        self._config = config
        try:
            self._divergence = get_divergence(config.divergence, **config.divergence_args)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"algorithm.divergence: {error}") from None
        self._vocab_size = _shared_vocab_size(student, teacher)

    @property
    def needs_whole_rows(self) -> str:
        return "" if self._divergence.is_pointwise() else f"algorithm.divergence {self._divergence.name}"

    def loss(
        self,
        student: LossRows,
        teacher: LossRows,
        shift_labels: torch.Tensor,
        *,
        num_items: float,
    ) -> KDLossOutput:
        return fused_kd_loss(
            **self._tensors(student, teacher, shift_labels),
            num_items=num_items,
            divergence=self._divergence,
            temperature=self._config.temperature,
            kd_weight=self._config.kd_weight,
            ce_weight=self._config.ce_weight,
            grad_filter_eps=self._config.grad_filter_eps,
        )

    @torch.no_grad()
    def evaluate(
        self,
        student: LossRows,
        teacher: LossRows,
        shift_labels: torch.Tensor,
        *,
        num_items: float,
    ) -> KDLossOutput:
        return fused_kd_loss(
            **self._tensors(student, teacher, shift_labels),
            num_items=num_items,
            divergence=ForwardKL(),
            ce_weight=1.0,
        )

    def _tensors(self, student: LossRows, teacher: LossRows, shift_labels: torch.Tensor) -> dict[str, Any]:
        """What both calls say of the two sides."""
        return {
            **side_arguments("student", student),
            **side_arguments("teacher", teacher),
            "shift_labels": shift_labels,
            "vocab_size": self._vocab_size,
            "chunk_size": self._config.chunk_size,
        }


def _shared_vocab_size(student: ModelInfo, teacher: ModelInfo) -> int:
    """How many entries of both heads mean the same token.

    Heads may be padded differently, but the tokenizers must be the same.
    """
    if student.vocab != teacher.vocab:
        differing = _first_difference(student.vocab, teacher.vocab)
        raise ConfigError(
            f"algorithm vanilla: student {student.name} ({len(student.vocab)} tokens) and teacher "
            f"{teacher.name} ({len(teacher.vocab)} tokens) have different vocabularies ({differing}); "
            "choose models of one tokenizer"
        )
    return min(student.vocab_size, teacher.vocab_size)


def _first_difference(student: Mapping[str, int], teacher: Mapping[str, int]) -> str:
    token = min(t for t, _ in student.items() ^ teacher.items())
    return f"token {token!r} is {student.get(token)} and {teacher.get(token)}"
