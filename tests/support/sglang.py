"""Tiny real models for SGLang: dense and sparse, with a tokenizer, weights far from uniform."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from support.tiny import VOCAB_SIZE, make_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _configs() -> dict[str, PreTrainedConfig]:
    sparse = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    return {
        "llama": LlamaConfig(**_COMMON),
        "qwen3": Qwen3Config(**_COMMON, head_dim=32),
        "moe": Qwen3MoeConfig(**_COMMON, head_dim=32, **sparse, norm_topk_prob=True),
    }


MODELS = tuple(_configs())


def make_model(name: str, folder: Path) -> Path:
    """Writes one of MODELS; its layers all matter, and its guesses are far from even."""
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(_configs()[name])
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(0, 0.1)
    model.save_pretrained(folder)
    make_tokenizer(topics["assert"] + topics["for"]).save_pretrained(folder)
    return folder
