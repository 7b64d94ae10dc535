"""Peak memory of a student rank and of a teacher worker, by part, in bytes.

T tokens of the largest microbatch, N of them in the loss, R ranks; other letters as in shapes.py. The sizes are those
that the code allocates: FSDP2 with fp32 master weights (student/fsdp2.py), what autograd saves of a transformers layer,
and the buffers of the loss's backend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdflow.plan.shapes import ModelShape
from kdflow.plan.work import FP32
from kdflow_kernels import torch_backend, triton_backend


@dataclass(frozen=True)
class Memory:
    """Parts that exist at the moment when a process needs most, and the sum of what stays in others' turns."""

    parts: Mapping[str, float]
    resting: float

    @property
    def total(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class LossMemory:
    """`gradients` stay until backward has taken them; `scratch` is gone when the loss is there."""

    scratch: float
    gradients: float


def activation_bytes(shape: ModelShape, num_tokens: int, item: int, *, checkpointing: bool, on_gpu: bool) -> float:
    """What autograd keeps of the layers and the final norm between forward and backward."""
    layer = _layer_activations(shape, item, on_gpu)
    kept = shape.num_layers * item * shape.hidden_size + layer if checkpointing else shape.num_layers * layer
    final = FP32 * shape.hidden_size + item * shape.hidden_size + FP32
    inputs = 8 + 2 * item * shape.head_size  # ids; cosines and sines of the positions
    return float(num_tokens * (kept + final + inputs))


def _layer_activations(shape: ModelShape, item: int, on_gpu: bool) -> int:
    """Bytes for one token."""
    hidden, q = shape.hidden_size, shape.num_heads * shape.head_size
    kv = shape.num_kv_heads * shape.head_size
    # Each of two norms keeps its input in fp32, its root and its output before the weight; the products their input.
    total = 2 * (FP32 * hidden + FP32 + item * hidden + item * hidden)
    total += item * (q + 2 * kv)  # as attention reads them
    # Attention's output, its log-sums, and the output once more where it is laid out anew for the product.
    total += item * q + FP32 * shape.num_heads + (0 if on_gpu else item * q)
    total += 4 * item * shape.intermediate_size  # gate, its silu, up, and what goes down
    if shape.head_norms:
        total += (q + kv) * (FP32 + item) + FP32 * (shape.num_heads + shape.num_kv_heads)
    return total


def loss_memory(
    student: ModelShape, teacher: ModelShape | None, num_rows: int, *, item: int, on_gpu: bool
) -> LossMemory:
    """What the loss allocates beyond its inputs, with the gradients of both of the student's.

    On a CPU without the native row step some 8 MiB a thread come on top.

    Args:
        teacher: None where it is cross-entropy alone.
    """
    make = _triton_loss if on_gpu else _torch_loss
    columns = student.vocab_size if teacher is None else min(student.vocab_size, teacher.vocab_size)
    return make(student, columns, num_rows, item, with_teacher=teacher is not None)


def _triton_loss(student: ModelShape, columns: int, num_rows: int, item: int, *, with_teacher: bool) -> LossMemory:
    backend = triton_backend
    row = columns * item
    group = backend.plan_groups(num_rows, row)
    num_groups = -(-num_rows // group)
    chunk = min(backend.CHUNK_ROWS * 2 // item, group) if with_teacher else 0
    many = num_groups > backend.GROUPS_IN_LOW_PRECISION
    weight = student.head_params * (FP32 + item if many else item)
    return LossMemory(
        scratch=float((group + chunk) * row),
        gradients=float(weight + num_rows * student.hidden_size * item),
    )


def _torch_loss(student: ModelShape, columns: int, num_rows: int, item: int, *, with_teacher: bool) -> LossMemory:
    hidden = student.hidden_size
    in_place = 0 < num_rows <= hidden + torch_backend.SCRATCH_ROWS
    group = max(1, num_rows if in_place else min(num_rows, torch_backend.SCRATCH_ROWS))
    chunk = -(-group // -(-group // torch_backend.CHUNK_ROWS)) if with_teacher else 0
    outside = columns
    if in_place:  # logits lie in the weight's gradient, as far as it goes
        outside = max(0, columns - student.head_params // max(group, hidden))
    scratch = (group * outside + chunk * columns) * item
    many = group < num_rows
    weight = student.head_params * (FP32 + item if many and item < FP32 else item)
    return LossMemory(
        scratch=float(scratch + min(group, num_rows) * hidden * FP32),  # a group's input gradient is summed in fp32
        gradients=float(weight + num_rows * hidden * item),
    )


def student_memory(
    shape: ModelShape,
    teachers: Sequence[ModelShape],
    *,
    num_tokens: int,
    num_rows: int,
    num_ranks: int,
    num_microbatches: int,
    item: int,
    teacher_item: int,
    checkpointing: bool,
    on_gpu: bool,
    ring_bytes: float,
    process_bytes: float,
) -> Memory:
    """One rank at its highest, which is either when the loss of a step's last microbatch is formed, or when the
    gradients of the largest unit are reduced."""
    params, unit = shape.num_params, shape.unit_params
    alone = num_ranks == 1
    # With ranks to share them layers are gathered two at a time, the root stays.
    gathered = params if alone else shape.root_params + 2 * max(shape.layer_params)
    fixed = {
        "process": process_bytes,
        "master weights, fp32": FP32 * params / num_ranks,
        "AdamW moments, fp32": 2 * FP32 * params / num_ranks,
        "weights gathered for computing": float(item * gathered),
        "teachers' heads": float(teacher_item * sum(teacher.head_params for teacher in teachers)),
        "ring": ring_bytes,
    }
    # Until the last microbatch, gradients wait whole and in fp32.
    waiting = FP32 * params if num_microbatches > 1 else 0
    activations = activation_bytes(shape, num_tokens, item, checkpointing=checkpointing, on_gpu=on_gpu)
    losses = [loss_memory(shape, teacher, num_rows, item=item, on_gpu=on_gpu) for teacher in teachers or [None]]
    loss = max(losses, key=lambda memory: memory.scratch + memory.gradients)
    at_loss = {
        **fixed,
        "gradients, fp32": float(waiting),
        "activations": activations,
        "loss: chunks of logits": loss.scratch,
        "loss: gradients of head and hidden states": loss.gradients,
    }
    at_reduction = {
        **fixed,
        "gradients, fp32": FP32 * params / num_ranks,
        "gradients on their way through the reduction": float((item + 2 * FP32) * unit),
    }
    resting = sum(fixed.values())
    return max((Memory(at_loss, resting), Memory(at_reduction, resting)), key=lambda memory: memory.total)


def teacher_memory(
    shape: ModelShape, *, num_tokens: int, item: int, with_kv: bool, process_bytes: float, num_shards: int = 1
) -> Memory:
    """One GPU of a worker; `with_kv` where the engine keeps keys and values of what it prefills."""
    kv = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * item
    # One layer at a time: the residual stream, norms in fp32, and the widest of attention and MLP.
    widest = max(3 * shape.intermediate_size, 4 * shape.num_heads * shape.head_size)
    working = 2 * item * shape.hidden_size + 2 * FP32 * shape.hidden_size + item * widest
    return Memory(
        {
            "process": process_bytes,
            "teacher's weights": item * shape.decoder_params / num_shards,
            "prefill": float(num_tokens * working),
            "keys and values": num_tokens * kv / num_shards if with_kv else 0.0,
        },
        resting=process_bytes,
    )
