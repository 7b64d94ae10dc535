"""Attention over packed samples: none sees another, and no mask is built.

On CUDA in half precision all samples go through one variable-length flash kernel, elsewhere each
through SDPA on its own. Where a microbatch is cut over ranks, what is said of samples holds for
the pieces that a rank has: the last queries of a sample's first keys.

Shapes: 1 batch, Q query heads, K key heads, T packed tokens, D head size, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from kdflow.errors import ConfigError
from kdflow.modeling.context import ContextKeys
from kdflow.modeling.placement import to_device

PACKED_ATTENTION = "kdflow_packed"


class PackedLengths:
    """Of queries and keys of each sample. An object, as torch.compile would compile a layer anew for each other tuple;
    not a dataclass, which FSDP copies for each layer, and whose fields torch 2.11 looks at where it is frozen.

    Attributes:
        queries, keys: alike where no microbatch is cut; host integers, so no device wait.
        context: brings keys and values of other ranks, adding up to `keys`.
        num_calls: how many layers have attended by these lengths.
    """

    def __init__(self, queries: tuple[int, ...], keys: tuple[int, ...], context: ContextKeys | None) -> None:
        self.queries, self.keys, self.context = queries, keys, context
        self.num_calls = 0


def packed_options(
    sequence_lengths: Sequence[int], device: torch.device, context: ContextKeys | None = None
) -> dict[str, Any]:
    """Keywords for the forward of a model whose attention is PACKED_ATTENTION.

    Made once for all layers. The last four are transformers' own, for models that take them.

    Args:
        sequence_lengths: lengths of the samples, adding up to T.
        context: where the microbatch is cut over ranks; its lengths count then.
    """
    queries = keys = tuple(sequence_lengths)
    if context is not None:
        queries, keys = context.query_lengths, context.key_lengths

    def ends(lengths: Sequence[int]) -> torch.Tensor:
        return to_device(np.cumsum((0, *lengths), dtype=np.int32), device)

    query_ends = ends(queries)
    return {
        "lengths": PackedLengths(queries, keys, context),
        "cu_seq_lens_q": query_ends,
        "cu_seq_lens_k": query_ends if context is None else ends(keys),
        "max_length_q": max(queries),
        "max_length_k": max(keys),
    }


@torch.compiler.disable  # each number of samples would be another graph, and there is nothing here to be fused
def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    lengths: PackedLengths,
    cu_seq_lens_q: torch.Tensor,
    cu_seq_lens_k: torch.Tensor,
    max_length_q: int,
    max_length_k: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each sample over itself alone.

    The signature is that of transformers' attention functions, which pass every keyword of
    the model's forward through.

    Args:
        query: (1, Q, T, D); key and value: (1, K, T, D), K dividing Q.
        lengths: of the samples; those of the queries add up to T.
        cu_seq_lens_q: (B + 1,) int32, where the queries of each sample begin and the last ones end.
        cu_seq_lens_k: the same of the keys.
        max_length_q, max_length_k: of the longest sample.
        sliding_window: a token sees itself and the `sliding_window - 1` before it.

    Returns:
        (1, T, Q, D) and None (no attention weights).

    Raises:
        ConfigError: the model caps its attention logits, which SDPA cannot do.
    """
    if softcap is not None:
        raise ConfigError(
            f"model: {type(module).__name__} caps its attention logits (softcap={softcap}), which packed attention "
            "does not support; take a model that does not, or a teacher of this one on SGLang"
        )
    assert attention_mask is None
    lengths.num_calls += 1
    assert sum(lengths.queries) == query.shape[2]
    if lengths.context is not None:
        key, value = lengths.context.gather(key, value)
    if sliding_window is not None and sliding_window >= max_length_k:
        sliding_window = None
    if _flash_takes(query):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        # SDPA's own kernel, which knows packed samples although SDPA does not: (T, Q, D).
        output, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            cu_seq_lens_q,
            cu_seq_lens_k,
            max_length_q,
            max_length_k,
            dropout,
            True,  # causal, the last query seeing all keys
            False,  # return_debug_mask
            scale=scaling,
            window_size_left=None if sliding_window is None else sliding_window - 1,
            window_size_right=None if sliding_window is None else 0,
        )
        return output[None], None
    outputs = []
    for q, k, v in zip(
        query.split(lengths.queries, dim=2),
        key.split(lengths.keys, dim=2),
        value.split(lengths.keys, dim=2),
        strict=True,
    ):
        num_queries, num_keys = q.shape[2], k.shape[2]
        mask = None
        if num_queries < num_keys or (sliding_window is not None and num_keys > sliding_window):
            position = torch.arange(num_keys, device=q.device)
            distance = position[num_keys - num_queries :, None] - position[None, :]
            mask = (distance >= 0) & (distance < (sliding_window or num_keys))
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


def _flash_takes(query: torch.Tensor) -> bool:
    head_size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_size % 8 == 0
        and head_size <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
