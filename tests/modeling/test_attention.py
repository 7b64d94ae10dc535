from __future__ import annotations

import re
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from kdflow.errors import ConfigError
from kdflow.modeling import PACKED_ATTENTION, check_decoder, forward_hidden_states, load_causal_lm
from kdflow.modeling.attention import packed_attention, packed_options

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
HEADS = {**SMALL, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
QWEN3_NEXT = {
    **HEADS,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
FALCON_H1 = {**HEADS, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
BERT = {**SMALL, "num_attention_heads": 2, "is_decoder": False}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("mamba", SMALL, "by which packed samples would see one another"),
        ("rwkv", {**SMALL, "attention_hidden_size": 16}, "RwkvModel keeps a state from token to token, by which"),
        ("qwen3_next", QWEN3_NEXT, "Qwen3NextModel has layers of linear_attention, by which"),
        ("falcon_h1", FALCON_H1, "FalconH1Model has layers of hybrid, by which"),
        ("bloom", {"vocab_size": 300, "hidden_size": 16, "n_layer": 2, "n_head": 2}, "0 of the 2 layers of BloomModel"),
        ("gemma2", HEADS, "Gemma2Attention caps its attention logits (softcap=50.0)"),
        ("bert", BERT, "BertSelfAttention lets tokens see later ones (is_causal=False)"),
        ("doge", HEADS, "DogeAttention gives its attention a mask of its own"),
        ("nemotron", HEADS, "NemotronAttention keeps the lengths of packed samples from its attention"),
    ],
)
def test_models_that_packed_attention_would_get_wrong_are_refused(kind: str, options: dict, message: str) -> None:
    config = AutoConfig.for_model(kind, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION)
    with torch.no_grad(), pytest.raises(ConfigError, match=re.escape(message)):
        forward_hidden_states(model.base_model, *packed(LENGTHS), LENGTHS)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("qwen3_next", QWEN3_NEXT, "m: Qwen3NextForCausalLM has layers of linear_attention, by which"),
        ("rwkv", {**SMALL, "attention_hidden_size": 16}, "m: RwkvForCausalLM keeps a state from token to token"),
        ("bart", {}, "m: bart is no decoder-only language model"),
        ("t5", {}, "m: t5 is no decoder-only language model"),
        ("llama", HEADS, None),
        ("gemma3", {}, None),
        ("gpt_oss", HEADS, None),
    ],
)
def test_what_a_config_tells(kind: str, options: dict, message: str | None) -> None:
    config = AutoConfig.for_model(kind, **options)
    if message is None:
        check_decoder(config, "m")
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_decoder(config, "m")


def attend(**options: object) -> torch.Tensor:
    """Of two heads with one key head, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), 8) for heads in (2, 1, 1)]
    query, key, value = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    packed = packed_options(LENGTHS, query.device)
    return packed_attention(torch.nn.Identity(), query, key, value, None, **packed, **options)[0]


@pytest.mark.parametrize("name", ["position_bias", "sinks", "indices", "anything_new"])
def test_keywords_that_attention_is_computed_by(name: str) -> None:
    with pytest.raises(ConfigError, match=f"Identity computes its attention by {name}, which"):
        attend(**{name: torch.zeros(1)})


def test_keywords_that_mean_nothing_here() -> None:
    handed_on = {"position_ids": torch.arange(sum(LENGTHS)), "output_router_logits": True, "use_cache": False}
    unused = {"position_bias": None, "sinks": None, "softcap": None, "anything_new": False}
    assert torch.equal(attend(**handed_on, **unused, is_causal=True), attend())


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


def test_attention_sinks() -> None:
    """Of a layer with a window and one without; forward and gradients as each sample alone under eager attention."""
    torch.manual_seed(0)
    config = GptOssConfig(**HEADS, sliding_window=4, num_local_experts=4, num_experts_per_tok=2)
    assert config.layer_types == ["sliding_attention", "full_attention"]
    plain = GptOssForCausalLM._from_config(deepcopy(config), attn_implementation="eager")
    with torch.no_grad():
        for layer, sinks in zip(plain.model.layers, ([1.5, -0.5], [0.0, 2.0]), strict=True):
            layer.self_attn.sinks.copy_(torch.tensor(sinks))
    ours = GptOssForCausalLM._from_config(config, attn_implementation=PACKED_ATTENTION)
    ours.load_state_dict(plain.state_dict())
    ids, positions = packed(LENGTHS)
    weight = torch.linspace(-1, 1, 16)
    hidden = forward_hidden_states(ours.base_model, ids, positions, LENGTHS)
    alone = torch.cat([plain.base_model(input_ids=part[None]).last_hidden_state[0] for part in ids.split(LENGTHS)])
    torch.testing.assert_close(hidden, alone, atol=1e-5, rtol=1e-5)
    for rows in (hidden, alone):
        (rows @ weight).square().sum().backward()
    for (name, a), (_, b) in zip(ours.base_model.named_parameters(), plain.base_model.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-3, msg=name)
    assert all(layer.self_attn.sinks.grad.abs().min() > 1e-6 for layer in ours.model.layers)
