"""aten's flash attention over packed samples, by its formula: (T, Q, D) and (T, K, D), Q a multiple of K."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

Sample = tuple[slice, slice, torch.Tensor]  # its queries, its keys, and which query sees which key


def _samples(cu_q: torch.Tensor, cu_k: torch.Tensor, max_q: int, max_k: int, window: int | None) -> Iterator[Sample]:
    """The last query sees the last key."""
    assert cu_q.is_cuda
    assert cu_k.is_cuda
    assert cu_q.dtype == cu_k.dtype == torch.int32
    q, k = cu_q.tolist(), cu_k.tolist()
    assert max_q == max(end - begin for begin, end in pairwise(q))
    assert max_k == max(end - begin for begin, end in pairwise(k))
    for (q_begin, q_end), (k_begin, k_end) in zip(pairwise(q), pairwise(k), strict=True):
        num_q, num_k = q_end - q_begin, k_end - k_begin
        distance = torch.arange(num_k)[num_k - num_q :, None] - torch.arange(num_k)
        seen = (distance >= 0) & (distance <= (num_k if window is None else window))
        yield slice(q_begin, q_end), slice(k_begin, k_end), seen


def _heads(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """(T, K, D) as (num_heads, T, D) in float32."""
    return tensor.transpose(0, 1).float().repeat_interleave(num_heads // tensor.shape[1], 0)


def forward(
    query, key, value, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, window_size_left=None, **_
):
    assert causal
    assert dropout == 0
    assert query.dtype in (torch.bfloat16, torch.float16)
    q, k, v = query.cpu(), key.cpu(), value.cpu()
    num_heads, scale = q.shape[1], scale or q.shape[-1] ** -0.5
    output, logsumexp = torch.empty_like(q), torch.empty(num_heads, len(q))
    for queries, keys, seen in _samples(cu_q, cu_k, max_q, max_k, window_size_left):
        logits = _heads(q[queries], num_heads) @ _heads(k[keys], num_heads).mT * scale
        logits = logits.masked_fill(~seen, -torch.inf)
        logsumexp[:, queries] = logits.logsumexp(-1)
        output[queries] = (logits.softmax(-1) @ _heads(v[keys], num_heads)).transpose(0, 1).to(q.dtype)
    unused = torch.zeros(2, dtype=torch.uint64).to(query.device)
    return output.to(query.device), logsumexp.to(query.device), unused, unused, query.new_empty(0)


def backward(
    grad, query, key, value, output, logsumexp, cu_q, cu_k, max_q, max_k, dropout, causal, *_, scale=None,
    window_size_left=None, **__
):  # fmt: skip
    g, q, k, v, o, lse = (tensor.cpu() for tensor in (grad, query, key, value, output, logsumexp))
    num_heads, num_kv, scale = q.shape[1], k.shape[1], scale or q.shape[-1] ** -0.5
    dq, dk, dv = (torch.empty(tensor.shape) for tensor in (q, k, v))

    def to_kv(gradient: torch.Tensor) -> torch.Tensor:
        return gradient.unflatten(0, (num_kv, -1)).sum(1).transpose(0, 1)

    for queries, keys, seen in _samples(cu_q, cu_k, max_q, max_k, window_size_left):
        Q, G, Y = (_heads(tensor[queries], num_heads) for tensor in (q, g, o))
        K, V = _heads(k[keys], num_heads), _heads(v[keys], num_heads)
        p = ((Q @ K.mT * scale).masked_fill(~seen, -torch.inf) - lse[:, queries, None]).exp()
        ds = p * (G @ V.mT - (G * Y).sum(-1, keepdim=True)) * scale
        dq[queries], dk[keys], dv[keys] = (ds @ K).transpose(0, 1), to_kv(ds.mT @ Q), to_kv(p.mT @ G)
    return tuple(gradient.to(query.device, query.dtype) for gradient in (dq, dk, dv))


LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("_flash_attention_forward", forward, "CUDA")
LIBRARY.impl("_flash_attention_backward", backward, "CUDA")
