"""Writes the student as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from kdflow.student.fsdp2 import FSDP2Student


def export_model(student: FSDP2Student, tokenizer: Any, folder: Path) -> None:
    """Safetensors in bfloat16, config, generation config, tokenizer and chat template.

    Every rank calls it; rank 0 writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(student.model, options=options)
    if dist.get_rank() == 0:
        model = student.model
        model.config.dtype = torch.bfloat16
        model.save_pretrained(
            folder, state_dict={name: w.to(torch.bfloat16) for name, w in weights.items()}
        )
        tokenizer.save_pretrained(folder)
    dist.barrier()
