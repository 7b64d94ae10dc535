"""Cuts a model to fewer layers: a common starting point for a student."""

from __future__ import annotations

from typing import Any

import torch

from kdflow.errors import ConfigError


def kept_layers(num_layers: int, num_kept: int) -> list[int]:
    """Evenly spaced layers, the first and the last among them."""
    if num_kept == 1:
        return [0]
    return [round(i * (num_layers - 1) / (num_kept - 1)) for i in range(num_kept)]


def prune_layers(model: Any, num_kept: int) -> Any:
    """Keeps embeddings, final norm, head and `num_kept` evenly spaced layers, in place.

    Args:
        model: a transformers causal LM whose decoder holds its layers in `layers`.

    Raises:
        ConfigError: `num_kept` is not between 1 and the model's number of layers.
    """
    decoder, config = model.base_model, model.config
    num_layers = len(decoder.layers)
    if not 1 <= num_kept <= num_layers:
        raise ConfigError(f"num_layers: expected 1 to {num_layers}, got {num_kept}")
    kept = kept_layers(num_layers, num_kept)
    decoder.layers = torch.nn.ModuleList(decoder.layers[i] for i in kept)
    for index, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = index
    config.num_hidden_layers = num_kept
    if config.to_dict().get("layer_types"):
        config.layer_types = [config.layer_types[i] for i in kept]
    return model
