from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kdflow.errors import ConfigError
from kdflow.modeling import (
    head_options,
    load_causal_lm,
    load_lm_head,
    load_tokenizer,
    prune_layers,
    resolve_device,
    resolve_dtype,
)
from kdflow.modeling.prune import kept_layers
from support.tiny import make_config


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("sharded", [True, False])
def test_lm_head_alone(tmp_path: Path, tied: bool, sharded: bool) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(tied=tied))
    model.save_pretrained(tmp_path, max_shard_size="50KB" if sharded else "5GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == sharded
    head = load_lm_head(str(tmp_path), torch.float32)
    assert torch.equal(head.weight, model.lm_head.weight)
    assert (head.bias, head.logit_scale, head.softcap) == (None, 1.0, None)
    assert (head.vocab_size, head.hidden_size) == model.lm_head.weight.shape


def test_missing_shard(tmp_path: Path) -> None:
    LlamaForCausalLM(make_config()).save_pretrained(tmp_path, max_shard_size="50KB")
    next(tmp_path.glob("model-00001*")).unlink()
    with pytest.raises(ConfigError, match="shards are missing: model-00001"):
        load_lm_head(str(tmp_path), torch.float32)


def test_no_safetensors(tmp_path: Path) -> None:
    make_config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected safetensors files"):
        load_lm_head(str(tmp_path), torch.float32)


@pytest.mark.parametrize("sharded", [True, False])
def test_weights_that_are_not_in_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sharded: bool
) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--some--model"
    snapshot = cached / "snapshots" / ("a" * 40)
    LlamaForCausalLM(make_config()).save_pretrained(snapshot, max_shard_size="50KB" if sharded else "5GB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("a" * 40)
    assert load_lm_head("some/model", torch.float32).vocab_size
    next(snapshot.glob("*.safetensors")).unlink()
    with pytest.raises(ConfigError, match=r"its weights cannot be read .*cache.*; fetch"):
        load_lm_head("some/model", torch.float32)


@pytest.mark.parametrize("load", [load_tokenizer, lambda m: load_causal_lm(m, torch.float32)])
def test_unknown_model(tmp_path: Path, load) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        load(str(tmp_path / "nowhere"))


def test_head_options(tmp_path: Path) -> None:
    config = make_config()
    for values, expected in (
        ({}, (1.0, None)),
        ({"logit_scale": 0.25}, (0.25, None)),
        ({"logits_scaling": 8.0}, (0.125, None)),
        ({"final_logit_softcapping": 30.0}, (1.0, 30.0)),
    ):
        made = type(config)(**{**config.to_dict(), **values})
        assert head_options(made) == expected


def test_kept_layers() -> None:
    assert kept_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert kept_layers(4, 4) == [0, 1, 2, 3]
    assert kept_layers(7, 1) == [0]


def test_prune_keeps_embeddings_and_spaced_layers(tiny: Path, tmp_path: Path) -> None:
    full = load_causal_lm(str(tiny / "teacher"), torch.float32)
    weights = {name: w.clone() for name, w in full.state_dict().items()}
    prune_layers(full, 3).save_pretrained(tmp_path)
    cut = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert cut.config.num_hidden_layers == 3
    assert json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"] == 3
    assert torch.equal(cut.model.embed_tokens.weight, weights["model.embed_tokens.weight"])
    for new, old in enumerate(kept_layers(4, 3)):
        name = "mlp.down_proj.weight"
        assert torch.equal(cut.model.layers[new].mlp.down_proj.weight, weights[f"model.layers.{old}.{name}"])
        assert cut.model.layers[new].self_attn.layer_idx == new
    with pytest.raises(ConfigError, match="expected 1 to 3, got 4"):
        prune_layers(full, 4)


def test_placement() -> None:
    cpu = torch.device("cpu")
    assert resolve_device("cpu") == cpu
    assert resolve_dtype("float16", cpu) is torch.float16
    assert resolve_dtype("auto", torch.device("cuda", 0)) is torch.bfloat16
    assert resolve_dtype("auto", cpu) in (torch.bfloat16, torch.float32)
    if not torch.cuda.is_available():
        assert resolve_device("auto") == cpu
        with pytest.raises(ConfigError, match="found none"):
            resolve_device("cuda")
