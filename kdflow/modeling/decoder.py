"""Runs the part of a causal language model below its head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from kdflow.errors import ConfigError
from kdflow.modeling.attention import packed_options
from kdflow.modeling.context import ContextKeys

_LAYERS = {"full_attention", "sliding_attention"}


def check_decoder(config: Any, option: str) -> None:
    """What a config tells of whether a model can run over packed samples; `forward_decoder` sees the rest.

    Args:
        option: that names the model.

    Raises:
        ConfigError: it is no causal LM, or its layers mix tokens by more than attention.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder:
        raise ConfigError(
            f"{option}: {config.model_type} is no decoder-only language model of transformers; expected one, such as "
            "Llama or Qwen3"
        )
    _check_layers(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config, option)


def _check_layers(kind: Any, config: Any, option: str) -> None:
    others = sorted(set(getattr(config.get_text_config(), "layer_types", None) or ()) - _LAYERS)
    if not others and not kind._is_stateful:  # that one is an attribute of every model of transformers
        return
    what = f"has layers of {', '.join(others)}" if others else "keeps a state from token to token"
    raise ConfigError(
        f"{option}: {kind.__name__} {what}, by which packed samples would see one another; expected a model whose "
        "layers mix tokens by attention alone, or a teacher of this one on SGLang"
    )


def forward_hidden_states(
    decoder: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    sequence_lengths: Sequence[int],
) -> torch.Tensor:
    """Last hidden states (after the final norm) of packed samples.

    Args:
        decoder: a transformers model without its head (`base_model` of a causal LM), loaded
            with `attn_implementation=PACKED_ATTENTION`.
        input_ids: (T,) int64.
        position_ids: (T,) int64, counting from 0 in each sample.
        sequence_lengths: lengths of the samples, adding up to T.

    Returns:
        (T, H) in the model's dtype.
    """
    return forward_decoder(decoder, input_ids, position_ids, sequence_lengths).last_hidden_state[0]


def forward_decoder(
    decoder: Any,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    sequence_lengths: Sequence[int],
    context: ContextKeys | None = None,
    **options: Any,
) -> Any:
    """The same with all that the decoder tells when it is asked by further `options` of its forward.

    Args:
        context: where ids and positions are a rank's part of these samples.

    Raises:
        ConfigError: not all of its layers attend by the lengths, so that samples saw one another.
    """
    _check_layers(type(decoder), decoder.config, "model")
    packed = packed_options(sequence_lengths, input_ids.device, context)
    told = decoder(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, **packed, **options)
    num_layers, num_calls = decoder.config.get_text_config().num_hidden_layers, packed["lengths"].num_calls
    if num_calls < num_layers:
        raise ConfigError(
            f"model: {num_calls} of the {num_layers} layers of {type(decoder).__name__} attend through transformers' "
            "attention interface, and by the others packed samples see one another; expected a model whose layers mix "
            "tokens by attention alone"
        )
    return told


def head_options(config: Any) -> tuple[float, float | None]:
    """(logit_scale, softcap) that a model of this config applies to its logits.

    Raises:
        ConfigError: both a factor and a divisor of the logits are set.
    """
    values = config.get_text_config().to_dict()
    scale, divisor = values.get("logit_scale"), values.get("logits_scaling")
    if scale is not None and divisor is not None:
        raise ConfigError("model config: logit_scale and logits_scaling exclude each other")
    logit_scale = 1.0 / divisor if divisor is not None else scale if scale is not None else 1.0
    return float(logit_scale), values.get("final_logit_softcapping")
