"""Cuts a model to fewer layers: a common starting point for a student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from kdflow.errors import ConfigError
from kdflow.modeling.loading import load_causal_lm, load_tokenizer, resolve_model
from kdflow.modeling.saving import check_free, written_aside


def kept_layers(num_layers: int, num_kept: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them."""
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def prune_model(model: str, num_kept: int, output: str) -> int:
    """Writes a model cut to `num_kept` layers, in bfloat16, and its tokenizer: whole, or not under that name.

    Args:
        model: folder or hub id.
        output: folder to write.

    Returns:
        Its number of parameters.

    Raises:
        ConfigError: the model cannot be read or cut.
        CheckpointError: `output` holds something or cannot be written.
    """
    folder = Path(resolve_model(output))
    check_free(folder)
    tokenizer = load_tokenizer(model)
    pruned = prune_layers(load_causal_lm(model, torch.bfloat16), num_kept)
    with written_aside(folder) as aside:
        pruned.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
    return sum(p.numel() for p in pruned.parameters())


def prune_layers(model: Any, num_kept: int) -> Any:
    """Keeps embeddings, final norm, head and `num_kept` evenly spaced layers, in place.

    Args:
        model: a transformers causal LM, its layers one list in the decoder.

    Raises:
        ConfigError: `num_kept` is not between 1 and the model's number of layers, or its config cannot tell which
            layers were kept.
    """
    config = model.config.get_text_config()
    num_layers = config.num_hidden_layers
    if not 1 <= num_kept <= num_layers:
        raise ConfigError(f"num_layers: expected 1 to {num_layers}, got {num_kept}")
    kept = kept_layers(num_layers, num_kept)
    parent, name = _layers(model, num_layers)
    layers = torch.nn.ModuleList(getattr(parent, name)[i] for i in kept)
    setattr(parent, name, layers)
    for index, layer in enumerate(layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = index
    _cut_config(config, kept)
    _check_config(model)
    return model


def _layers(model: Any, num_layers: int) -> tuple[torch.nn.Module, str]:
    """The module that holds the list of layers, and by which name: `layers`, or `h` (GPT-2)."""
    for module in (*model.get_decoder().modules(), *model.base_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == num_layers:
                return module, name
    raise ConfigError(
        f"{type(model).__name__} has no list of {num_layers} layers, so it cannot be cut; expected a decoder of layers "
        "in one list, such as Llama, Qwen3 or GPT-2"
    )


def _cut_config(config: Any, kept: Sequence[int]) -> None:
    """Also in what it tells of each layer: lists of as many entries as there are layers (`layer_types` and others)."""
    num_layers, values = config.num_hidden_layers, config.to_dict()
    config.num_hidden_layers = len(kept)
    for name, value in values.items():
        if name == "mlp_only_layers":  # numbers of layers
            setattr(config, name, [new for new, old in enumerate(kept) if old in (value or ())])
        elif name == "first_k_dense_replace":
            setattr(config, name, sum(old < value for old in kept))
        elif ("layer" in name or name.endswith("types")) and isinstance(value, list) and len(value) == num_layers:
            setattr(config, name, [value[i] for i in kept])


def _check_config(model: Any) -> None:
    """Raises ConfigError where a model made of the config would not be the one at hand."""
    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(type(model.config).from_dict(model.config.to_dict())).state_dict()
    except (ValueError, StrictDataclassError) as error:
        raise _inconsistent(model, str(error).strip().splitlines()[-1].strip()) from None
    own = model.state_dict()
    others = [n for n in {**own, **made} if n not in own or n not in made or own[n].shape != made[n].shape]
    if others:
        raise _inconsistent(model, f"{len(others)} tensors would differ, {others[0]} for one")


def _inconsistent(model: Any, why: str) -> ConfigError:
    return ConfigError(
        f"num_layers: the config of {type(model).__name__} cannot tell that these layers were kept ({why}); keep "
        "another number, or take a model whose layers are alike"
    )
