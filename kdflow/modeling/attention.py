"""Attention over packed samples: none sees another, and no mask is built.

Shapes: 1 batch, Q query heads, K key heads, T packed tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

PACKED_ATTENTION = "kdflow_packed"


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    sequence_lengths: Sequence[int],
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each sample over itself alone.

    The signature is that of transformers' attention functions, which pass every keyword of
    the model's forward through; `sequence_lengths` is ours, host integers, so no device wait.

    Args:
        query: (1, Q, T, D); key and value: (1, K, T, D), K dividing Q.
        sequence_lengths: lengths of the samples, adding up to T.
        sliding_window: a token sees itself and the `sliding_window - 1` before it.

    Returns:
        (1, T, Q, D) and None (no attention weights).

    Raises:
        ValueError: the model caps its attention logits, which SDPA cannot do.
    """
    if softcap is not None:
        raise ValueError(
            f"{type(module).__name__} caps its attention logits (softcap={softcap}); "
            "packed attention does not support that"
        )
    assert attention_mask is None
    assert sum(sequence_lengths) == query.shape[2]
    outputs = []
    for q, k, v in zip(
        query.split(tuple(sequence_lengths), dim=2),
        key.split(tuple(sequence_lengths), dim=2),
        value.split(tuple(sequence_lengths), dim=2),
        strict=True,
    ):
        length = q.shape[2]
        mask = None
        if sliding_window is not None and length > sliding_window:
            position = torch.arange(length, device=q.device)
            distance = position[:, None] - position[None, :]
            mask = (distance >= 0) & (distance < sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2), None


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
