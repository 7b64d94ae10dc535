"""What a microbatch costs: products and attention in flops, everything else in bytes that memory moves.

A microbatch is the lengths of its samples and its number of loss rows N; T tokens are the sum of the
lengths. Letters as in shapes.py. Bytes are those of eager transformers, where every operator reads and
writes its tensors; they were counted in the code of a Llama layer, operator by operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from kdflow.plan.shapes import ModelShape

FP32 = 4
# Bytes of a parameter that a step reads and writes: AdamW reads weight, gradient and both moments and writes all but
# the gradient; clipping reads the gradients and scales them; the copy in the compute dtype is cast anew.
OPTIMIZER_BYTES = 4 * FP32 + 3 * FP32 + FP32 + 2 * FP32


@dataclass(frozen=True)
class Work:
    """
    Attributes:
        flops: of products with weights.
        attention_flops: of queries, keys and values.
        operator_bytes: of the layers' operators between them.
        moved_bytes: of the optimizer and of sums of gradients.
        logits: that pass through the rows of the loss.
    """

    flops: float = 0.0
    attention_flops: float = 0.0
    operator_bytes: float = 0.0
    moved_bytes: float = 0.0
    logits: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))


def attention_flops(shape: ModelShape, lengths: Sequence[int]) -> float:
    """QK^T and PV of all layers, the half above the diagonal not among them."""
    per_layer = 2 * shape.num_heads * shape.head_size * sum(n * n for n in lengths)
    return float(shape.num_layers * per_layer)


def linear_flops(shape: ModelShape, num_tokens: int) -> float:
    """All matrix products of the layers, without the head."""
    return 2.0 * num_tokens * sum(shape.active_linear)


def layer_bytes(shape: ModelShape, item: int) -> int:
    """Bytes that a layer's forward reads and writes for one token, products aside."""
    hidden, heads = shape.hidden_size, (shape.num_heads + shape.num_kv_heads) * shape.head_size
    # To fp32; square, mean, scale; back; times the weight.
    norm = (item + FP32) + 2 * FP32 + FP32 + 2 * FP32 + (FP32 + item) + 2 * item
    residual = 3 * item
    # Halves swapped, two products, one sum; the swap is a negation and a concatenation.
    rope = (2 + 2 + 2 + 2 + 3) * item
    gate = 5 * item  # silu, and the product with the other half
    total = hidden * 2 * (norm + residual) + heads * rope + shape.intermediate_size * gate
    total += 4 * item * shape.num_heads * shape.head_size  # attention's output, laid out anew
    return total + (heads * norm if shape.head_norms else 0)


def forward_work(shape: ModelShape, lengths: Sequence[int], item: int) -> Work:
    tokens = sum(lengths)
    return Work(
        flops=linear_flops(shape, tokens),
        attention_flops=attention_flops(shape, lengths),
        operator_bytes=float(tokens * shape.num_layers * layer_bytes(shape, item)),
    )


def backward_work(shape: ModelShape, lengths: Sequence[int], item: int, *, recomputed: bool) -> Work:
    """Two products for each one of forward; attention's five for its two; twice the bytes."""
    tokens = sum(lengths)
    work = Work(
        flops=2 * linear_flops(shape, tokens),
        attention_flops=2.5 * attention_flops(shape, lengths),
        operator_bytes=2.0 * tokens * shape.num_layers * layer_bytes(shape, item),
    )
    return work + forward_work(shape, lengths, item) if recomputed else work


def loss_work(student: ModelShape, teacher: ModelShape | None, num_rows: int) -> Work:
    """Both projections and the two products of the gradient: 2NV(Ht + 3Hs); cross-entropy alone has no teacher's."""
    vocab, per_logit = student.vocab_size, 3 * student.hidden_size
    if teacher is not None:
        vocab, per_logit = min(vocab, teacher.vocab_size), per_logit + teacher.hidden_size
    return Work(flops=2.0 * num_rows * vocab * per_logit, logits=float(num_rows * vocab))


def optimizer_work(num_params: float, item: int) -> Work:
    return Work(moved_bytes=num_params * (OPTIMIZER_BYTES + FP32 + item))


def accumulation_work(num_params: float, item: int) -> Work:
    """A microbatch's gradients, cast to fp32 and added."""
    return Work(moved_bytes=num_params * (item + FP32 + 3 * FP32))
