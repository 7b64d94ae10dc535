"""Positions that a config promises, beside what the model does beyond them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdflow.errors import ConfigError
from kdflow.modeling import PACKED_ATTENTION, check_positions, forward_hidden_states

SHAPE = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA = {**SHAPE, "intermediate_size": 16, "num_key_value_heads": 1, "max_position_embeddings": 8}
OPT = {**SHAPE, "ffn_dim": 16, "word_embed_proj_dim": 16, "max_position_embeddings": 8}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
GPTJ = {**GPT2, "rotary_dim": 4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
GEMMA3 = {**LLAMA, "head_dim": 8, "sliding_window": 4, "layer_types": ["full_attention"]}
TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def run(config: object, length: int) -> None:
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    with torch.no_grad():
        forward_hidden_states(model.base_model, torch.ones(length, dtype=torch.int64), torch.arange(length), (length,))


@pytest.mark.parametrize(("kind", "options"), [("gpt2", GPT2), ("opt", OPT), ("gptj", GPTJ)])
def test_a_table_of_positions_ends(kind: str, options: dict) -> None:
    config = AutoConfig.for_model(kind, **options)
    assert check_positions(config, 8, "data.max_length") is None
    run(config, 8)
    with pytest.raises(ConfigError, match=f"data.max_length: got 9, but {kind} has a table of 8 positions; expected"):
        check_positions(config, 9, "data.max_length")
    with pytest.raises(IndexError):
        run(config, 9)


@pytest.mark.parametrize(
    ("kind", "options", "longest"),
    [
        ("llama", LLAMA, 8),
        ("llama", {**LLAMA, "rope_parameters": YARN}, 32),
        ("gemma3_text", {**GEMMA3, "rope_parameters": TWO_ROPES}, 32),
    ],
)
def test_rotary_embeddings_go_on(kind: str, options: dict, longest: int) -> None:
    config = AutoConfig.for_model(kind, **options)
    assert check_positions(config, longest, "data.max_length") is None
    warning = check_positions(config, longest + 1, "data.max_length")
    assert warning is not None
    assert warning.startswith(f"data.max_length: {longest + 1} tokens, and {kind} was made for 8 positions")
    run(config, longest + 1)
