"""Supervised fine-tuning: cross-entropy with the data's own tokens, no teacher.

On text that a teacher wrote it is black-box distillation (sequence-level knowledge distillation, Kim and Rush,
https://arxiv.org/abs/1606.07947).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from kdflow.algorithms.base import ALGORITHMS, ModelInfo, side_arguments
from kdflow.config import AlgorithmConfig
from kdflow.types import LossRows
from kdflow_kernels import KDLossOutput, fused_kd_loss


@ALGORITHMS.register("sft")
class SFT:
    """Cross-entropy averaged over tokens; the options of the distillation term say nothing here."""

    uses_teacher: ClassVar[bool] = False

    def __init__(self, config: AlgorithmConfig, *, student: ModelInfo, teacher: ModelInfo | None) -> None:
        self._config = config

    @property
    def needs_whole_rows(self) -> str:
        return ""

    def loss(
        self,
        student: LossRows,
        teacher: LossRows,
        shift_labels: torch.Tensor,
        *,
        num_items: float,
    ) -> KDLossOutput:
        return fused_kd_loss(
            **side_arguments("student", student),
            teacher_input=None,
            teacher_weight=None,
            shift_labels=shift_labels,
            num_items=num_items,
            kd_weight=0.0,
            ce_weight=1.0,
            grad_filter_eps=self._config.grad_filter_eps,
            chunk_size=self._config.chunk_size,
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
        output = self.loss(student, teacher, shift_labels, num_items=num_items)
        return output._replace(kd_loss=torch.full_like(output.kd_loss, math.nan))
