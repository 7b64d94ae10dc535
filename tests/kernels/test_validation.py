"""Bad input: one error, its message naming argument, value and remedy, and no gradient left behind."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from kdflow_kernels import FusedKDLoss, fused_kd_loss


def tensors() -> dict:
    g = torch.Generator().manual_seed(0)
    return {
        "student_input": torch.randn(6, 4, generator=g).requires_grad_(),
        "student_weight": torch.randn(20, 4, generator=g).requires_grad_(),
        "teacher_input": torch.randn(6, 5, generator=g),
        "teacher_weight": torch.randn(20, 5, generator=g),
        "shift_labels": torch.tensor([3, 19, -100, 0, 7, 7]),
    }


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


f32 = torch.zeros
BAD = {
    "rows": ({"teacher_input": f32(5, 5)}, ValueError, "teacher_input: expected 6 rows (student_input), got 5"),
    "student hidden": (
        {"student_input": f32(6, 3)},
        ValueError,
        "student_input: expected hidden size 4 (student_weight), got 3",
    ),
    "teacher hidden": (
        {"teacher_input": f32(6, 4)},
        ValueError,
        "teacher_input: expected hidden size 5 (teacher_weight), got 4",
    ),
    "three dimensions": (
        {"student_input": f32(2, 3, 4)},
        ValueError,
        "student_input: expected 2 dimensions, got shape (2, 3, 4); flatten",
    ),
    "device": (
        {"teacher_weight": torch.empty(20, 5, device="meta")},
        ValueError,
        "teacher_weight: expected device cpu",
    ),
    "mixed dtypes": (
        {"student_weight": f32(20, 4).bfloat16()},
        TypeError,
        "student_weight: expected torch.float32 (student_input), got torch.bfloat16; cast",
    ),
    "integer input": (
        {"teacher_input": torch.zeros(6, 5, dtype=torch.int64)},
        TypeError,
        "teacher_input: expected bfloat16, float16, float32 or float64, got torch.int64",
    ),
    "not a tensor": ({"student_weight": [[0.0]]}, TypeError, "student_weight: expected a torch.Tensor, got list"),
    "vocabularies": (
        {"teacher_weight": f32(24, 5)},
        ValueError,
        "teacher_weight: expected 20 tokens (student_weight), got 24; pass vocab_size=",
    ),
    "vocab_size": ({"vocab_size": 21}, ValueError, "vocab_size: expected 1 to 20, the smaller of the heads"),
    "one side's ids": (
        {"student_token_ids": ids(1, 2)},
        ValueError,
        "teacher_token_ids: got None with the other given",
    ),
    "ids and vocab_size": (
        {"student_token_ids": ids(1), "teacher_token_ids": ids(1), "vocab_size": 3},
        ValueError,
        "vocab_size: cannot be combined",
    ),
    "numbers of ids": (
        {"student_token_ids": ids(1, 2), "teacher_token_ids": ids(1)},
        ValueError,
        "teacher_token_ids: expected 2 ids (student_token_ids), got 1",
    ),
    "id too high": (
        {"student_token_ids": ids(1, 20), "teacher_token_ids": ids(1, 2)},
        ValueError,
        "student_token_ids: expected ids from 0 to 19, got 20",
    ),
    "id negative": (
        {"student_token_ids": ids(1, 2), "teacher_token_ids": ids(-1, 2)},
        ValueError,
        "teacher_token_ids: expected ids from 0 to 19, got -1",
    ),
    "id twice": (
        {"student_token_ids": ids(4, 4), "teacher_token_ids": ids(1, 2)},
        ValueError,
        "student_token_ids: expected distinct ids, got 4 more than once",
    ),
    "ids' dtype": (
        {"student_token_ids": ids(4).int(), "teacher_token_ids": ids(1)},
        TypeError,
        "student_token_ids: expected int64 of shape (K,)",
    ),
    "label too high": (
        {"shift_labels": ids(1, 2, 20, 3, 4, 5)},
        ValueError,
        "shift_labels: expected 0 to 19 (student_weight) or ignore_index=-100, got 20 in row 2",
    ),
    "label negative": ({"shift_labels": ids(-1, 2, 2, 3, 4, 5)}, ValueError, "got -1 in row 0"),
    "labels' dtype": ({"shift_labels": f32(6)}, TypeError, "shift_labels: expected int64, got torch.float32"),
    "labels' shape": (
        {"shift_labels": ids(1, 2)},
        ValueError,
        "shift_labels: expected shape (6,) (student_input), got (2,)",
    ),
    "ce without labels": (
        {"shift_labels": None, "ce_weight": 1.0},
        ValueError,
        "shift_labels: got None with ce_weight=1.0",
    ),
    "row_weight's shape": (
        {"row_weight": f32(5)},
        ValueError,
        "row_weight: expected shape (6,) (student_input), got (5,)",
    ),
    "row_weight's dtype": (
        {"row_weight": torch.ones(6, dtype=torch.bool)},
        TypeError,
        "row_weight: expected a floating dtype, got torch.bool",
    ),
    "bias": ({"student_bias": f32(19)}, ValueError, "student_bias: expected shape (20,) (student_weight), got (19,)"),
    "temperature 0": ({"temperature": 0.0}, ValueError, "temperature: expected a finite number above 0, got 0.0"),
    "temperature nan": (
        {"temperature": float("nan")},
        ValueError,
        "temperature: expected a finite number above 0, got nan",
    ),
    "temperature None": ({"temperature": None}, TypeError, "temperature: expected a finite number above 0, got None"),
    "temperature as text": ({"temperature": "2"}, TypeError, "temperature: expected a finite number above 0, got '2'"),
    "temperature to be learned": (
        {"temperature": torch.tensor(2.0, requires_grad=True)},
        TypeError,
        "temperature: expected a finite number above 0, got a tensor that requires gradients",
    ),
    "softcap to be learned": (
        {"student_softcap": torch.tensor(2.0, requires_grad=True), "backend": "reference"},
        TypeError,
        "student_softcap: expected a finite number above 0 or None, got a tensor that requires gradients",
    ),
    "no student": ({"student_input": None}, TypeError, "student_input: expected a torch.Tensor, got NoneType"),
    "labels as a list": ({"shift_labels": [1] * 6}, TypeError, "shift_labels: expected a torch.Tensor, got list"),
    "rows of numpy's": (
        {"student_input": np.ones((6, 4))},
        TypeError,
        "student_input: expected a torch.Tensor, got nd",
    ),
    "ids as a list": (
        {"student_token_ids": [1], "teacher_token_ids": ids(1)},
        TypeError,
        "student_token_ids: expected a torch.Tensor, got list",
    ),
    "ignore_index None": ({"ignore_index": None}, TypeError, "ignore_index: expected an integer, got None"),
    "vocab_size's type": (
        {"vocab_size": 5.0},
        TypeError,
        "vocab_size: expected a number of tokens of at least 1 or None, got 5.0",
    ),
    "num_items' type": ({"num_items": "8"}, TypeError, "num_items: expected a number above 0 or None, got '8'"),
    "kd_weight": ({"kd_weight": float("inf")}, ValueError, "kd_weight: expected a finite number, got inf"),
    "softcap": (
        {"student_softcap": -1.0},
        ValueError,
        "student_softcap: expected a finite number above 0 or None, got -1.0",
    ),
    "logit_scale": (
        {"teacher_logit_scale": 0.0},
        ValueError,
        "teacher_logit_scale: expected a finite number other than 0, got 0.0",
    ),
    "divergence": ({"divergence": "fkl"}, ValueError, "divergence: unknown name 'fkl'; known: adaptive_kl, forward_kl"),
    "divergence's type": (
        {"divergence": 3},
        TypeError,
        "divergence: expected a registered name or a Divergence instance, got 3",
    ),
    "reduction": ({"reduction": "batchmean"}, ValueError, "reduction: unknown 'batchmean'; known: mean, sum, none"),
    "backend": ({"backend": "cuda"}, ValueError, "backend: unknown 'cuda'; known: auto, triton, torch, reference"),
    "chunk_size": ({"chunk_size": 0}, ValueError, "chunk_size: expected a number of rows of at least 1 or None, got 0"),
    "grad_filter_eps": (
        {"grad_filter_eps": -1e-3},
        ValueError,
        "grad_filter_eps: expected 0 (exact) or a small positive number, got -0.001",
    ),
    "num_items 0": ({"num_items": 0}, ValueError, "num_items: expected a number above 0, got 0"),
    "num_items' shape": (
        {"num_items": f32(2)},
        ValueError,
        "num_items: expected one number, got a tensor of shape (2,)",
    ),
    "num_items and sum": (
        {"num_items": 3, "reduction": "sum"},
        ValueError,
        "num_items: only reduction='mean' divides by it",
    ),
    "no teacher": (
        {"teacher_input": None, "teacher_weight": None},
        ValueError,
        "teacher_input: got None with kd_weight=1.0",
    ),
    "half a teacher": ({"teacher_weight": None}, ValueError, "teacher_weight: got None with the other given"),
}


@pytest.mark.parametrize("change, error, message", BAD.values(), ids=BAD)
def test_message(change: dict, error: type[Exception], message: str):
    given = {**tensors(), **change}
    with pytest.raises(error, match=re.escape(message)):
        fused_kd_loss(**given)
    assert all(t.grad is None for t in given.values() if isinstance(t, torch.Tensor))


def test_triton_needs_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        RuntimeError, match=r"backend='triton': it needs a CUDA device, got cpu.*or use backend='torch'"
    ):
        fused_kd_loss(**tensors(), backend="triton")


def test_module_checks_its_options_when_made():
    with pytest.raises(ValueError, match="temperature"):
        FusedKDLoss(temperature=-1.0)
    with pytest.raises(ValueError, match="known: adaptive_kl"):
        FusedKDLoss(divergence="fkl")


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


ALL = {**tensors(), "ce_weight": 0.5, "row_weight": torch.rand(6), "num_items": torch.tensor(7.0)}
ALL |= {
    "student_bias": f32(20),
    "teacher_bias": f32(20),
    "student_token_ids": ids(1, 2),
    "teacher_token_ids": ids(3, 1),
}
CUT = [name for name, value in ALL.items() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", CUT)
def test_dtensor_is_sent_to_the_root_modules_forward(name: str, mesh):
    given = {**ALL, name: distribute_tensor(ALL[name].detach(), mesh)}
    with pytest.raises(TypeError, match=rf"{name}: .* got a DTensor; compute the loss inside the root FSDP"):
        fused_kd_loss(**given)


@pytest.mark.parametrize("paired", [False, True])
def test_what_a_collective_still_brings_is_waited_for(paired: bool):
    """What C++ reads must not be the tensor that stands for it."""
    given = {**ALL, "reduction": "sum", "num_items": None, "shift_labels": ids(3, 19, 2, 0, 7, 7)}
    if not paired:
        given["student_token_ids"] = given["teacher_token_ids"] = None
    wanted = fused_kd_loss(**given).loss
    for name in CUT:
        if given[name] is not None:
            coming = AsyncCollectiveTensor(given[name].detach())
            assert fused_kd_loss(**{**given, name: coming}).loss == wanted


def test_a_custom_ignore_index():
    given = tensors()
    given["shift_labels"] = ids(1, 2, -1, 3, -1, 4)
    assert fused_kd_loss(**given, ignore_index=-1).num_tokens == 4


def test_numbers_of_numpys_and_torchs_are_numbers():
    as_numpy = {"temperature": np.float32(2), "vocab_size": np.int64(5), "chunk_size": np.int32(2)}
    as_torch = {"temperature": torch.tensor(2.0), "vocab_size": torch.tensor(5), "chunk_size": torch.tensor(2)}
    wanted = fused_kd_loss(**tensors(), temperature=2.0, vocab_size=5, chunk_size=2).loss
    assert fused_kd_loss(**tensors(), **as_numpy).loss == wanted
    assert fused_kd_loss(**tensors(), **as_torch).loss == wanted
    assert FusedKDLoss(**as_numpy)(**tensors()).loss == wanted
