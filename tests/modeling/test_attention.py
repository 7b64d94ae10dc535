from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from kdflow.errors import ConfigError
from kdflow.modeling import PACKED_ATTENTION, forward_hidden_states, load_causal_lm

LENGTHS = (5, 1, 9)


def packed(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 300, (sum(lengths),), generator=generator)
    return ids, torch.cat([torch.arange(n) for n in lengths])


def test_packed_samples_equal_samples_alone(tiny: Path) -> None:
    ids, positions = packed(LENGTHS)
    model = load_causal_lm(str(tiny / "teacher"), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny / "teacher", attn_implementation="eager")
    with torch.no_grad():
        ours = forward_hidden_states(model.base_model, ids, positions, LENGTHS)
        alone = [plain.base_model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(LENGTHS)]
    torch.testing.assert_close(ours, torch.cat(alone), atol=1e-5, rtol=1e-5)


SMALL = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
GEMMA2 = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mamba", SMALL, "0 of the 2 layers of MambaModel attend"),
        ("bloom", {"vocab_size": 300, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "0 of the 2 layers of BloomModel"),
        ("gemma2", GEMMA2, "Gemma2Attention caps its attention logits (softcap=50.0)"),
    ],
)
def test_models_in_which_samples_would_see_one_another_are_refused(kind: str, options: dict, message: str) -> None:
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    with torch.no_grad(), pytest.raises(ConfigError, match=re.escape(message)):
        forward_hidden_states(model.base_model, *packed(LENGTHS), LENGTHS)


def test_gradients_equal_too(tiny: Path) -> None:
    ids, positions = packed(LENGTHS)
    ours = load_causal_lm(str(tiny / "teacher"), torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny / "teacher", attn_implementation="eager")
    weight = torch.linspace(-1, 1, 48)
    (forward_hidden_states(ours.base_model, ids, positions, LENGTHS) @ weight).sum().backward()
    for part in ids.split(LENGTHS):
        (plain.base_model(input_ids=part[None]).last_hidden_state[0] @ weight).sum().backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_sliding_window() -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    plain = MistralForCausalLM._from_config(deepcopy(config), attn_implementation="eager")
    ours = MistralForCausalLM._from_config(config, attn_implementation=PACKED_ATTENTION)
    ours.load_state_dict(plain.state_dict())
    ids, positions = packed(LENGTHS)
    with torch.no_grad():
        hidden = forward_hidden_states(ours.base_model, ids, positions, LENGTHS)
        alone = [plain.base_model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(LENGTHS)]
    torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-5, rtol=1e-5)
