"""Writes the student as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM

from kdflow.student.fsdp2 import FSDP2Student


def export_model(student: FSDP2Student, tokenizer: Any, folder: Path) -> None:
    """Safetensors in bfloat16, config, generation config, tokenizer and chat template.

    Every rank calls it; rank 0 writes.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(student.model, options=options)
    if dist.get_rank() == 0:
        with torch.device("meta"):  # carries config and names; the weights come from the state
            shell = AutoModelForCausalLM.from_config(student.model.config, dtype=torch.bfloat16)
        shell.generation_config = student.model.generation_config
        shell.save_pretrained(
            folder, state_dict={n: w.to(torch.bfloat16) for n, w in weights.items() if isinstance(w, torch.Tensor)}
        )
        tokenizer.save_pretrained(folder)
    dist.barrier()
