from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from kdflow.errors import ConfigError
from kdflow.modeling import (
    head_options,
    load_causal_lm,
    load_decoder,
    load_lm_head,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from support.tiny import FAMILIES, make_config


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


LOADERS = [load_causal_lm, load_decoder]


def change(folder: Path, model: torch.nn.Module, **tensors: torch.Tensor | None) -> str:
    """Saves the model with these tensors in place of its own; None leaves them out, `__` stands for a dot."""
    model.save_pretrained(folder)  # type: ignore[operator]
    changes = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    changed = load_file(folder / "model.safetensors") | changes
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("load", LOADERS)
def test_missing_weights_are_not_made_up(tmp_path: Path, load) -> None:
    lacks = {f"model__layers__1__mlp__{name}_proj__weight": None for name in ("up", "gate", "down")}
    model = change(tmp_path, LlamaForCausalLM(make_config(tied=False)), **lacks)
    with pytest.raises(
        ConfigError, match=r"3 of them are missing \(.*layers\.1\.mlp\.down_proj.*; .*gate.*; \.\.\.\) and 0"
    ):
        load(model, torch.float32)


@pytest.mark.parametrize("load", LOADERS)
def test_weights_of_another_shape(tmp_path: Path, load) -> None:
    model = change(tmp_path, LlamaForCausalLM(make_config()), model__norm__weight=torch.zeros(47))
    message = r"0 of them are missing and 1 have another shape \(.*norm.weight is \(47,\), not \(48,\)\); fetch"
    with pytest.raises(ConfigError, match=message):
        load(model, torch.float32)


def test_a_head_that_is_missing(tmp_path: Path) -> None:
    """An error where it is not tied to the embeddings; and not where it is, or nobody asked for it."""
    model = change(tmp_path / "own", LlamaForCausalLM(make_config(tied=False)), lm_head__weight=None)
    with pytest.raises(ConfigError, match=r"1 of them are missing \(lm_head\.weight\)"):
        load_causal_lm(model, torch.float32)
    load_decoder(model, torch.float32)
    LlamaForCausalLM(make_config(tied=True)).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    for load in LOADERS:
        load(str(tmp_path / "tied"), torch.float32)


@pytest.mark.parametrize("load", LOADERS)
def test_further_tensors_are_left_alone(tmp_path: Path, load) -> None:
    model = change(tmp_path, LlamaForCausalLM(make_config(tied=False)), mtp__proj__weight=torch.zeros(3))
    load(model, torch.float32)


@pytest.mark.parametrize("shape", [None, (3, 3)])
def test_an_expert_that_does_not_fit_the_others(tmp_path: Path, shape: tuple[int, int] | None) -> None:
    tensor = None if shape is None else torch.zeros(shape)
    model = change(tmp_path, FAMILIES["qwen3_moe"](), model__layers__0__mlp__experts__1__up_proj__weight=tensor)
    with pytest.raises(ConfigError, match=r"one weight \(of experts, say\) are missing or of different shapes"):
        load_causal_lm(model, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("load", LOADERS)
def test_each_family_is_whole_as_it_is_saved(tmp_path: Path, family: str, load) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    load(str(tmp_path), torch.float32)


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
