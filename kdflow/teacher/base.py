"""What a teacher is."""

from __future__ import annotations

from typing import Protocol

import torch

from kdflow.config import TeacherConfig
from kdflow.registry import Registry
from kdflow.types import Microbatch


class Teacher(Protocol):
    """Prefills microbatches.

    Attributes:
        hidden_size: H of its last hidden states.
        dtype: of its hidden states.
        device: where it computes, with its index where that is a GPU.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    def __init__(self, config: TeacherConfig, *, gpu: int) -> None:
        """Loads the model; `gpu`, counted round, is the one to take where it runs on CUDA."""
        ...

    def prefill(self, microbatch: Microbatch, out: torch.Tensor) -> None:
        """Writes the last hidden states (after the final norm) of the loss rows.

        Args:
            out: (N, H) in `dtype`, in host memory or on `device`; written when this returns.
        """
        ...


TEACHERS: Registry[type[Teacher]] = Registry("teacher backend", {"hf": "kdflow.teacher.hf"})
