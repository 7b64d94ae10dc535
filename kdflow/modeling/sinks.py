"""Attention sinks: a learned logit for each head that takes of the softmax's weight and gives no value (GPT-OSS).

Shapes: Q query heads, T packed tokens, n and m queries and keys of one sample, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def with_sink_key(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor | None, sinks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Key, value and mask for SDPA, with one key more that every query sees: its logit is the sink and its value zero.

    Args:
        query: (1, Q, n, D), of which number and dtype count.
        seen: (n, m) which query sees which key; None: those up to its own.
        sinks: (Q,)
    """
    if seen is None:
        seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, -torch.inf)
    sink = sinks.to(query.dtype).view(1, -1, 1, 1).expand(-1, -1, len(mask), 1)
    mask = torch.cat((mask.expand(1, len(sinks), -1, -1), sink), dim=-1)
    return F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1)), mask


class FlashWithSinks(torch.autograd.Function):
    """torch's flash kernel over packed samples, which knows no sinks but tells the logsumexp l of each row's logits.

    With l' = log(exp(l) + exp(sink)) its output times exp(l - l') is the one with sinks. The probabilities are then
    exp(logit - l'), which is what the kernel's own backward makes of l' and that output; and d sink is the sum over
    rows of -exp(sink - l') (grad . output), the sink having no value.

    Args of `apply`:
        query, key, value: (T, heads, D)
        sinks: (Q,)
        lengths: those that `_flash_attention_forward` and `_flash_attention_backward` take behind the tensors.
        options: their keywords.
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, lengths: tuple[Any, ...], options: dict[str, Any]):
        flash = torch.ops.aten._flash_attention_forward
        output, logsumexp, *random_state, _ = flash(query, key, value, *lengths, False, **options)
        with_sinks = torch.logaddexp(logsumexp, sinks.float()[:, None])  # (Q, T)
        output = (output * (logsumexp - with_sinks).exp().T[..., None]).to(query.dtype)
        ctx.save_for_backward(query, key, value, sinks, output, with_sinks, *random_state)
        ctx.lengths, ctx.options = lengths, options
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        (gradient,) = gradients
        query, key, value, sinks, output, with_sinks, *random_state = ctx.saved_tensors
        flash = torch.ops.aten._flash_attention_backward
        of_inputs = flash(
            gradient.contiguous(), query, key, value, output, with_sinks, *ctx.lengths, *random_state, **ctx.options
        )
        weights = (sinks.float()[:, None] - with_sinks).exp()  # (Q, T)
        of_sinks = -(weights.T * (gradient.float() * output.float()).sum(-1)).sum(0)
        return *of_inputs, of_sinks.to(sinks.dtype), None, None
