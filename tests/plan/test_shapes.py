"""What is on paper against what real models have, compute and keep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from kdflow.errors import ConfigError
from kdflow.modeling import PACKED_ATTENTION, forward_hidden_states
from kdflow.plan import work
from kdflow.plan.memory import activation_bytes
from kdflow.plan.shapes import ModelShape, load_shape, shape_of

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LLAMA = LlamaConfig(**SIZES, tie_word_embeddings=True)
QWEN = Qwen3Config(**SIZES, tie_word_embeddings=False)
MOE = Qwen3MoeConfig(**SIZES, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64)
LENGTHS = (40, 24, 9)


def real_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED_ATTENTION)
    return model.train()


def run(model: Any) -> torch.Tensor:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return forward_hidden_states(model.base_model, positions % 7, positions, LENGTHS)


@pytest.mark.parametrize("config", [LLAMA, QWEN, MOE], ids=["llama", "qwen3", "qwen3-moe"])
def test_parameters_are_counted_exactly(config: Any) -> None:
    model, shape = real_model(config), shape_of(config, "tiny")
    assert shape.num_params == sum(p.numel() for p in model.parameters())
    assert sum(shape.layer_params) == sum(p.numel() for p in model.base_model.layers.parameters())
    head = model.get_output_embeddings().weight
    assert shape.head_params == head.numel()
    assert shape.decoder_params == sum(p.numel() for p in model.base_model.parameters())
    assert shape.root_params == shape.num_params - sum(shape.layer_params)


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen3"])
def test_flops_are_those_that_torch_counts(config: Any) -> None:
    model, shape = real_model(config), shape_of(config, "tiny")
    linear, attention = work.linear_flops(shape, sum(LENGTHS)), work.attention_flops(shape, LENGTHS)
    # As plain products attention has the half above the diagonal, too, and keeps what a flash kernel computes anew.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            hidden = run(model)
        assert forward.get_total_flops() == linear + 2 * attention
        with FlopCounterMode(display=False) as backward:
            hidden.sum().backward()
        assert backward.get_total_flops() == 2 * linear + 2 * 2 * attention
    ours = work.forward_work(shape, LENGTHS, 4) + work.backward_work(shape, LENGTHS, 4, recomputed=False)
    assert (ours.flops, ours.attention_flops) == (3 * linear, 3.5 * attention)


def test_a_token_meets_a_part_of_the_experts() -> None:
    layer = real_model(MOE).base_model.layers[0]
    dense = sum(m.weight.numel() for m in layer.modules() if isinstance(m, torch.nn.Linear))
    experts = sum(p.numel() for n, p in layer.named_parameters() if ".experts." in n)
    router = sum(p.numel() for n, p in layer.named_parameters() if n.endswith("gate.weight"))
    shape = shape_of(MOE, "tiny")
    attention = sum(p.numel() for n, p in layer.self_attn.named_parameters() if p.ndim == 2)
    assert experts > 0
    assert shape.active_linear[0] == attention + router + experts * 2 // 8
    assert shape.active_linear[0] < dense + experts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen3"])
def test_activations_are_what_autograd_keeps(config: Any, dtype: torch.dtype) -> None:
    model = real_model(config, dtype)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[torch.Tensor] = []  # so that no address is taken twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(model)
    shape = shape_of(config, "tiny")
    options = {"item": dtype.itemsize, "on_gpu": False}
    whole = activation_bytes(shape, sum(LENGTHS), checkpointing=False, **options)
    assert whole == pytest.approx(sum(kept.values()), rel=0.01)
    thrifty = activation_bytes(shape, sum(LENGTHS), checkpointing=True, **options)
    assert whole / 3 < thrifty < whole / 2  # of three layers, one at a time


def test_a_shape_comes_from_the_config_alone(tmp_path) -> None:
    LLAMA.save_pretrained(tmp_path)
    shape = load_shape(str(tmp_path))
    assert isinstance(shape, ModelShape)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    assert (shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_size) == (3, 6, 2, 16)
    with pytest.raises(ConfigError, match=r"no folder with a config\.json"):
        load_shape(str(tmp_path / "none"))
