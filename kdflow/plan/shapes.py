"""The shape of a decoder, read from its config: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from kdflow.algorithms import ALGORITHMS
from kdflow.config import RunConfig, TeacherConfig
from kdflow.errors import ConfigError
from kdflow.modeling import load_model_config


@dataclass(frozen=True)
class ModelShape:
    """A causal language model in numbers.

    Attributes:
        num_params: all of them, shared ones once.
        layer_params: of each layer.
        active_linear: weights of a layer's matrix products that one token meets, by layer; a part of the experts
            where there are experts.
        num_heads, num_kv_heads, head_size: Q, K, D of attention.
        intermediate_size: numbers between the products of a layer's MLP for each token.
        head_norms: queries and keys are normalised by head.
        tied: the head is the embeddings.
    """

    name: str
    vocab_size: int
    hidden_size: int
    num_params: int
    layer_params: tuple[int, ...]
    active_linear: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_size: int
    intermediate_size: int
    head_norms: bool
    tied: bool

    @property
    def num_layers(self) -> int:
        return len(self.layer_params)

    @property
    def head_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def root_params(self) -> int:
        """What is in no layer: embeddings, final norm, head."""
        return self.num_params - sum(self.layer_params)

    @property
    def decoder_params(self) -> int:
        """All but a head of its own."""
        return self.num_params - (0 if self.tied else self.head_params)

    @property
    def unit_params(self) -> int:
        """The largest group of parameters that FSDP gathers at once."""
        return max(self.root_params, *self.layer_params)


def load_shape(model: str) -> ModelShape:
    """Of a folder with a config.json, or a hub id.

    Raises:
        ConfigError: no such model, or not a decoder of layers with attention and MLP.
    """
    return shape_of(load_model_config(model), model)


def teachers_of(config: RunConfig) -> dict[str, TeacherConfig]:
    """Those that a run learns from, by name; none where its algorithm learns from text alone.

    Raises:
        ConfigError: no such algorithm.
    """
    return config.named_teachers() if ALGORITHMS.get(config.algorithm.name).uses_teacher else {}


def load_teachers(config: RunConfig) -> dict[str, ModelShape]:
    """Of all that a run learns from.

    Raises:
        ConfigError: as `load_shape` and `teachers_of`.
    """
    return {name: load_shape(teacher.model) for name, teacher in teachers_of(config).items()}


def shape_of(config: Any, name: str) -> ModelShape:
    """Parameters are counted on a model without memory, so they are right for every architecture."""
    text = config.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = model.base_model.layers
        active = _active_share(text)
        heads, hidden = text.num_attention_heads, text.hidden_size
        return ModelShape(
            name=name,
            vocab_size=text.vocab_size,
            hidden_size=hidden,
            num_params=sum(p.numel() for p in model.parameters()),
            layer_params=tuple(sum(p.numel() for p in layer.parameters()) for layer in layers),
            active_linear=tuple(_active_linear(layer, active) for layer in layers),
            num_heads=heads,
            num_kv_heads=text.num_key_value_heads,
            head_size=getattr(text, "head_dim", None) or hidden // heads,
            intermediate_size=_intermediate_size(text),
            head_norms=any(n.endswith("q_norm") for n, _ in layers[0].named_modules()),
            tied=bool(text.tie_word_embeddings),
        )
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"{name}: expected a decoder whose config has attention heads and an MLP, got "
            f"{type(config).__name__} ({error}); the planner knows models in the manner of Llama and Qwen"
        ) from None


def _active_share(text: Any) -> float:
    """Of the experts' weights, what one token meets."""
    num_experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    return text.num_experts_per_tok / num_experts if num_experts else 1.0


def _active_linear(layer: torch.nn.Module, active: float) -> int:
    """Weights of nn.Linear, and the experts' stacks of matrices as far as one token meets them."""
    total = 0.0
    for name, parameter in layer.named_parameters():
        if parameter.ndim == 3 or (parameter.ndim == 2 and ".experts." in f".{name}"):
            total += active * parameter.numel()
        elif parameter.ndim == 2:
            total += parameter.numel()
    return round(total)


def _intermediate_size(text: Any) -> int:
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    if not experts:
        return text.intermediate_size
    width = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
    return text.num_experts_per_tok * width
