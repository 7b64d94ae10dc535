"""Attention over packed samples: none sees another, and no mask is built.

On CUDA in half precision all samples go through one variable-length flash kernel, elsewhere each
through SDPA on its own. Where a microbatch is cut over ranks, what is said of samples holds for
the pieces that a rank has: the last queries of a sample's first keys.

Shapes: 1 batch, Q query heads, K key heads, T packed tokens, D head size, B samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from kdflow.errors import ConfigError
from kdflow.modeling.context import ContextKeys
from kdflow.modeling.placement import to_device
from kdflow.modeling.sinks import FlashWithSinks, with_sink_key

PACKED_ATTENTION = "kdflow_packed"
# What models of transformers hand on to attention, and no attention function computes by. The lengths are ours besides.
_HARMLESS = {
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids", "cache_position", "use_cache",
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "num_items_in_batch",
    "deterministic",
}  # fmt: skip


class PackedLengths:
    """Of queries and keys of each sample. An object, as torch.compile would compile a layer anew for each other tuple;
    not a dataclass, which FSDP copies for each layer, and whose fields torch 2.11 looks at where it is frozen.

    Attributes:
        queries, keys: alike where no microbatch is cut; host integers, so no device wait.
        context: brings keys and values of other ranks, adding up to `keys`.
        query_ends, key_ends: (B + 1,) int32, where each sample begins and the last one ends.
        num_calls: how many layers have attended by these lengths.
    """

    def __init__(
        self, queries: tuple[int, ...], keys: tuple[int, ...], context: ContextKeys | None, device: torch.device
    ) -> None:
        self.queries, self.keys, self.context = queries, keys, context
        self.query_ends = self.key_ends = _ends(queries, device)
        if context is not None:
            self.key_ends = _ends(keys, device)
        self.num_calls = 0


def _ends(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return to_device(np.cumsum((0, *lengths), dtype=np.int32), device)


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
    lengths = PackedLengths(queries, keys, context, device)
    return {
        "lengths": lengths,
        "cu_seq_lens_q": lengths.query_ends,
        "cu_seq_lens_k": lengths.key_ends,
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
    lengths: PackedLengths | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention of each sample over itself alone.

    The signature is that of transformers' attention functions, which pass every keyword of
    the model's forward through.

    Args:
        query: (1, Q, T, D); key: (1, K, T, D) and value: (1, K, T, Dv), K dividing Q.
        lengths: of the samples; those of the queries add up to T.
        sliding_window: a token sees itself and the `sliding_window - 1` before it.
        s_aux: (Q,) attention sinks: a logit for each head that takes of the softmax's weight and has no value.
        others: those that attention is computed by are refused, by name.

    Returns:
        (1, T, Q, Dv) and None (no attention weights).

    Raises:
        ConfigError: the model wants attention of another kind.
    """
    _check(module, lengths, attention_mask, is_causal, others)
    assert lengths is not None
    assert sum(lengths.queries) == query.shape[2]
    lengths.num_calls += 1
    if lengths.context is not None:
        key, value = lengths.context.gather(key, value)
    if sliding_window is not None and sliding_window >= max(lengths.keys):
        sliding_window = None
    if _flash_takes(query, value):
        # SDPA's own kernel, which knows packed samples although SDPA does not: (T, Q, D).
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        longest = max(lengths.queries), max(lengths.keys)
        # The last: causal, the last query seeing all keys.
        arguments = (lengths.query_ends, lengths.key_ends, *longest, dropout, True)
        options = {
            "scale": scaling,
            "window_size_left": None if sliding_window is None else sliding_window - 1,
            "window_size_right": None if sliding_window is None else 0,
        }
        if s_aux is not None:
            output = FlashWithSinks.apply(q, k, v, s_aux, arguments, options)
            assert isinstance(output, torch.Tensor)
        else:
            output, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *arguments, False, **options)
        return output[None], None
    outputs = []
    for q, k, v in zip(
        query.split(lengths.queries, dim=2),
        key.split(lengths.keys, dim=2),
        value.split(lengths.keys, dim=2),
        strict=True,
    ):
        mask = _seen(q.shape[2], k.shape[2], sliding_window, q.device)
        if s_aux is not None:
            k, v, mask = with_sink_key(q, k, v, mask, s_aux)
        output = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _check(
    module: torch.nn.Module,
    lengths: PackedLengths | None,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    others: Mapping[str, object],
) -> None:
    """Raises ConfigError for attention of another kind. What models do without is None or False."""
    wants = [name for name, v in others.items() if name not in _HARMLESS and v is not None and v is not False]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if lengths is None:
        what = "keeps the lengths of packed samples from its attention"
    elif others.get("softcap") is not None:
        what = f"caps its attention logits (softcap={others['softcap']})"
    elif attention_mask is not None:
        what = "gives its attention a mask of its own"
    elif not is_causal:
        what = "lets tokens see later ones (is_causal=False)"
    elif wants:
        what = f"computes its attention by {', '.join(wants)}"
    else:
        return
    raise ConfigError(
        f"model: {type(module).__name__} {what}, which packed attention does not support; "
        "take a model that does not, or a teacher of this one on SGLang"
    )


def _seen(num_queries: int, num_keys: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """(queries, keys) which query sees which key, the last query the last key; None: those up to its own."""
    if num_queries == num_keys and (sliding_window is None or num_keys <= sliding_window):
        return None
    position = torch.arange(num_keys, device=device)
    distance = position[num_keys - num_queries :, None] - position[None, :]
    return (distance >= 0) & (distance < (sliding_window or num_keys))


def _flash_takes(query: torch.Tensor, value: torch.Tensor) -> bool:
    head_size = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and head_size % 8 == 0
        and head_size <= 256
        and head_size == value.shape[-1]
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
