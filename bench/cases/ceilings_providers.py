"""What ``bench ceilings`` runs in the workers. A copy of B bytes reads B and writes B: its rate
counts B, so that the traffic of the memory is twice it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from bench.model import Trial
from kdflow_kernels import fused_kd_loss

Params = Mapping[str, Any]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def gemm(params: Params) -> Trial:
    size, device = params["size"], params["device"]
    left, right = (torch.randn(size, size, device=device).to(DTYPES[params["dtype"]]) for _ in range(2))
    product = torch.empty_like(left)
    return _repeated(params, lambda: torch.mm(left, right, out=product))


def device_copy(params: Params) -> Trial:
    source = torch.zeros(params["num_bytes"], dtype=torch.uint8, device=params["device"])
    target = torch.ones_like(source)
    return _repeated(params, lambda: target.copy_(source))


def attention(params: Params) -> Trial:
    """Causal, forward and backward, of samples one after another."""
    heads, kv_heads, length = params["num_heads"], params["num_kv_heads"], params["length"]
    query, key, value = (_leaf(params, 1, count, length, params["head_size"]) for count in (heads, kv_heads, kv_heads))
    gradient = torch.randn_like(query)

    def once() -> None:
        for _ in range(params["num_samples"]):
            F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).backward(gradient)

    return _repeated(params, once)


def layer_operators(params: Params) -> Trial:
    """Both norms and residuals, rotation, gate and the new layout of attention's output, forward and backward.

    As in a Llama layer of transformers, run eagerly, without the products between them.
    """
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    tokens, heads, size = params["num_samples"] * params["length"], params["num_heads"], params["head_size"]
    hidden, residual = (_leaf(params, 1, tokens, params["hidden_size"]) for _ in range(2))
    query, key, attended = (_leaf(params, 1, n, tokens, size) for n in (heads, params["num_kv_heads"], heads))
    gate, up = (_leaf(params, 1, tokens, params["intermediate_size"]) for _ in range(2))
    cos, sin = (_leaf(params, 1, tokens, size).detach() for _ in range(2))
    norms = [LlamaRMSNorm(params["hidden_size"]).to(hidden) for _ in range(2)]
    inputs = [hidden, residual, query, key, attended, gate, up, *(norm.weight for norm in norms)]

    def forward() -> list[torch.Tensor]:
        normalised = [norm(hidden + residual) for norm in norms]
        rotated = apply_rotary_pos_emb(query, key, cos, sin)
        return [*normalised, *rotated, attended.transpose(1, 2).contiguous(), F.silu(gate) * up]

    gradients = [torch.randn_like(output) for output in forward()]
    return _repeated(params, lambda: torch.autograd.grad(forward(), inputs, gradients))


def _leaf(params: Params, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=params["device"]).to(DTYPES[params["dtype"]]).requires_grad_()


def loss_rows(params: Params) -> Trial:
    """Forward KL with its gradients between hidden states so narrow that the products cost nothing."""
    rows, vocab, hidden = params["num_rows"], params["vocab_size"], params["hidden_size"]
    student, head, teacher, teacher_head = (
        torch.randn(count, hidden, device=params["device"]).to(DTYPES[params["dtype"]])
        for count in (rows, vocab, rows, vocab)
    )
    student.requires_grad_()
    head.requires_grad_()

    def once() -> None:
        student.grad = head.grad = None
        fused_kd_loss(student, head, teacher, teacher_head, backend="auto").loss.backward()

    return _repeated(params, once)


def host_to_device(params: Params) -> Trial:
    host, device = _both_memories(params)
    return _repeated(params, lambda: device.copy_(host, non_blocking=True))


def device_to_host(params: Params) -> Trial:
    host, device = _both_memories(params)
    return _repeated(params, lambda: host.copy_(device, non_blocking=True))


def both_ways(params: Params) -> Trial:
    """One buffer up and another one down, each on its stream; the rate counts one of them."""
    (up_host, up_device), (down_host, down_device) = _both_memories(params), _both_memories(params)
    down = torch.cuda.Stream()

    def once() -> None:
        down.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(down):
            down_host.copy_(down_device, non_blocking=True)
        up_device.copy_(up_host, non_blocking=True)
        torch.cuda.current_stream().wait_stream(down)

    return _repeated(params, once)


def _both_memories(params: Params) -> tuple[torch.Tensor, torch.Tensor]:
    device = torch.zeros(params["num_bytes"], dtype=torch.uint8, device=params["device"])
    return torch.ones(params["num_bytes"], dtype=torch.uint8).pin_memory(), device


def _repeated(params: Params, once: Callable[[], object]) -> Trial:
    def step() -> None:
        for _ in range(params["repeats"]):
            once()

    return Trial(step, on_stream=True)
