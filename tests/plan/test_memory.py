"""The loss's memory on paper against what it really allocates, and parts that must add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdflow.plan.memory import loss_memory, student_memory, teacher_memory
from kdflow.plan.shapes import ModelShape, shape_of
from kdflow_kernels import fused_kd_loss, triton_backend
from plan.live_bytes import LiveBytes
from plan.test_shapes import LLAMA, QWEN

STUDENT = replace(shape_of(LLAMA, "student"), vocab_size=16384, hidden_size=128)
TEACHER = replace(shape_of(LLAMA, "teacher"), vocab_size=16384, hidden_size=192)


def real_loss(num_rows: int, dtype: torch.dtype, backend: str, *, with_teacher: bool = True) -> LiveBytes:
    student, head, teacher, teacher_head = (
        torch.randn(rows, columns).to(dtype)
        for rows, columns in (
            (num_rows, STUDENT.hidden_size),
            (STUDENT.vocab_size, STUDENT.hidden_size),
            (num_rows, TEACHER.hidden_size),
            (TEACHER.vocab_size, TEACHER.hidden_size),
        )
    )
    student.requires_grad_()
    head.requires_grad_()
    live = LiveBytes()
    labels = torch.arange(num_rows)
    live.watch(student, head, teacher, teacher_head, labels)
    with live:
        if with_teacher:
            output = fused_kd_loss(student, head, teacher, teacher_head, backend=backend)
        else:  # as algorithm sft calls it
            output = fused_kd_loss(
                student, head, None, None, shift_labels=labels, kd_weight=0.0, ce_weight=1.0, backend=backend
            )
        output.loss.backward()
    return live


ROW_STEP_BYTES = 8 * 2**20  # a thread, where the native row step is not built


# In the weight's gradient altogether; partly beside it; in several groups.
@pytest.mark.parametrize("num_rows", [96, 400, 1500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher", [TEACHER, None])
def test_the_torch_backends_buffers(num_rows: int, dtype: torch.dtype, teacher: ModelShape | None) -> None:
    live = real_loss(num_rows, dtype, "torch", with_teacher=teacher is not None)
    found = loss_memory(STUDENT, teacher, num_rows, item=dtype.itemsize, on_gpu=False)
    total = found.scratch + found.gradients
    assert 0.9 * total < live.peak < 1.1 * total + ROW_STEP_BYTES * torch.get_num_threads()
    assert found.gradients > STUDENT.head_params * dtype.itemsize


# One group, and three. (Where their sum is in fp32, a CPU makes copies that a GPU does not.)
@pytest.mark.parametrize("most_rows", [2**20, 128])
@pytest.mark.parametrize("teacher", [TEACHER, None])
def test_the_triton_backends_buffers(
    most_rows: int, teacher: ModelShape | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton_backend, "LOGITS_BYTES", most_rows * 2 * STUDENT.vocab_size)
    monkeypatch.setattr(triton_backend, "CHUNK_ROWS", 64)
    live = real_loss(288, torch.bfloat16, "triton", with_teacher=teacher is not None)
    found = loss_memory(STUDENT, teacher, 288, item=2, on_gpu=True)
    assert found.scratch + found.gradients == pytest.approx(live.peak, rel=0.06)


def test_parts_of_a_student_add_up_and_shrink_with_ranks() -> None:
    shape = shape_of(QWEN, "student")

    def memory(**changes) -> dict:
        options = {
            "num_tokens": 512,
            "num_rows": 400,
            "num_ranks": 1,
            "num_microbatches": 1,
            "item": 2,
            "teacher_item": 2,
            "checkpointing": False,
            "on_gpu": True,
            "ring_bytes": 7.0,
            "process_bytes": 11.0,
        }
        found = student_memory(shape, [shape_of(QWEN, "teacher")], **{**options, **changes})
        assert found.total == sum(found.parts.values())
        return dict(found.parts)

    one, four = memory(), memory(num_ranks=4)
    for part in ("master weights, fp32", "AdamW moments, fp32"):
        assert four[part] == one[part] / 4
    assert one["master weights, fp32"] == 4 * shape.num_params
    assert one["weights gathered for computing"] == 2 * shape.num_params
    assert four["weights gathered for computing"] < one["weights gathered for computing"]
    assert four["teachers' heads"] == one["teachers' heads"] == 2 * shape.head_params
    assert memory(num_microbatches=2)["gradients, fp32"] == 4 * shape.num_params
    assert memory(num_tokens=2**16)["activations"] > 4 * memory(num_tokens=2**16, checkpointing=True)["activations"] / 3
    small = memory(num_tokens=8, num_rows=8)
    assert "gradients on their way through the reduction" in small  # then that is the highest moment


def test_a_teacher_on_several_gpus_holds_a_part_on_each() -> None:
    shape: ModelShape = shape_of(LLAMA, "teacher")
    whole = teacher_memory(shape, num_tokens=64, item=2, with_kv=True, process_bytes=5.0)
    half = teacher_memory(shape, num_tokens=64, item=2, with_kv=True, process_bytes=5.0, num_shards=2)
    assert whole.parts["teacher's weights"] == 2 * shape.decoder_params
    for part in ("teacher's weights", "keys and values"):
        assert half.parts[part] == whole.parts[part] / 2
    assert whole.parts["keys and values"] == 64 * 3 * 2 * 2 * 16 * 2  # tokens, layers, K and V, heads, size, bytes
