"""The head alone: with a bias, and quantised ones refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdflow.errors import ConfigError
from kdflow.modeling import load_final_norm, load_lm_head
from support.sglang import make_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model("llama", tmp_path / "model")


def change(model: Path, drop: tuple[str, ...] = (), **tensors: torch.Tensor) -> None:
    path = model / "model.safetensors"
    weights = {name: w for name, w in load_file(path).items() if name not in drop}
    named = {f"lm_head.{name}": tensor for name, tensor in tensors.items()}
    save_file(weights | named, path, metadata={"format": "pt"})


def test_bias(model: Path) -> None:
    bias = torch.arange(384.0)
    change(model, bias=bias)
    head = load_lm_head(str(model), torch.bfloat16)
    assert head.bias is not None
    assert torch.equal(head.bias, bias.bfloat16())
    assert head.weight.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("drop", "tensors", "name"),
    [
        (("lm_head.weight",), {"qweight": torch.zeros(16, 384, dtype=torch.int32)}, "lm_head.qweight"),
        (("lm_head.weight",), {"weight_packed": torch.zeros(384, 16, dtype=torch.int32)}, "lm_head.weight_packed"),
        ((), {"weight_scale": torch.ones(384, 1)}, "lm_head.weight_scale"),
        ((), {"weight": torch.zeros(384, 128, dtype=torch.int8)}, "lm_head.weight is quantised (torch.int8)"),
        (
            (),
            {"weight": torch.zeros(384, 128).to(torch.float8_e4m3fn)},
            "lm_head.weight is quantised (torch.float8_e4m3fn)",
        ),
    ],
)
def test_quantised_heads_are_refused_by_name(model: Path, drop, tensors: dict[str, torch.Tensor], name: str) -> None:
    change(model, drop, **tensors)
    with pytest.raises(ConfigError) as caught:
        load_lm_head(str(model), torch.float32)
    assert name in str(caught.value)
    assert "leaves lm_head out" in str(caught.value)


def test_final_norm(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    norm = load_final_norm(str(model))
    assert norm is not None
    rows = torch.randn(5, 128)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).model.norm
    torch.testing.assert_close(norm(rows), loaded(rows))
