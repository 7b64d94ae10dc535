"""A student, the rows of its teacher and their samples, on this rank's device or on one of the test's choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from kdflow.algorithms import ALGORITHMS, ModelInfo
from kdflow.config import AlgorithmConfig, DataConfig, OptimizerConfig, StudentConfig, TeacherConfig
from kdflow.data import Step, load_datasets, training_steps
from kdflow.modeling import load_lm_head, load_tokenizer
from kdflow.student import FSDP2Student
from kdflow.teacher import TEACHERS
from kdflow.types import Microbatch, Sample
from support.ranks import own_device

CPU = torch.device("cpu")
CONFIG = {"ce_weight": 0.3, "temperature": 1.5}


def make_student(
    model: str,
    teacher: str | None,
    *,
    num_steps: int = 8,
    learning_rate: float = 3e-3,
    eps: float = 1e-8,
    device: torch.device | None = None,
    **options: Any,
) -> FSDP2Student:
    info = ModelInfo("tiny", {}, 384)
    return FSDP2Student(
        StudentConfig(model, compute_dtype=options.pop("compute_dtype", "float32"), **options),
        OptimizerConfig(learning_rate=learning_rate, warmup_steps=1, eps=eps),
        algorithms={"": ALGORITHMS.get("vanilla")(AlgorithmConfig(**CONFIG), student=info, teacher=info)},
        teacher_heads={"": load_lm_head(teacher, torch.float32) if teacher else None},
        device=own_device() if device is None else device,
        num_steps=num_steps,
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in host memory, gathered from all ranks where it is sharded."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


class Rows:
    """Rows of the real teacher, straight from its decoder, in host memory."""

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        device = own_device() if device is None else device
        config = TeacherConfig(str(folder / "teacher"), dtype="float32", device=device.type)
        self._teacher = TEACHERS.get("hf")(config, gpu=device.index or 0)

    def __call__(self, microbatch: Microbatch) -> torch.Tensor:
        out = torch.empty(microbatch.num_loss_tokens, self._teacher.hidden_size)
        if len(out):
            self._teacher.prefill(microbatch, out)
        return out


def rank_steps(
    samples: Sequence[Sample],
    *,
    num_steps: int,
    samples_per_step: int,
    tokens_per_microbatch: int,
    start: int = 0,
    ranks_per_microbatch: int = 1,
) -> Iterator[Step]:
    """Steps as this rank of the process group has them."""
    return training_steps(
        samples,
        num_steps=num_steps,
        samples_per_step=samples_per_step,
        tokens_per_microbatch=tokens_per_microbatch,
        seed=0,
        rank=dist.get_rank() // ranks_per_microbatch,
        num_ranks=dist.get_world_size() // ranks_per_microbatch,
        start=start,
    )


def load_samples(folder: Path) -> list[Sample]:
    config = DataConfig(str(folder / "conversations.jsonl"), num_eval_samples=0, max_length=128)
    return load_datasets(config, load_tokenizer(str(folder / "student")), 0)[0].samples
