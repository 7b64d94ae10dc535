"""The row step in C++ against the one in torch: the same numbers, whatever lies in the rows."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

from kdflow_kernels import Divergence, fused_kd_loss, get_divergence, list_divergences, native_rows, register_divergence
from kdflow_kernels.native_rows import NativeRows

POINTWISE = [name for name in list_divergences() if get_divergence(name).is_pointwise()]
VOCAB = 1300  # two full tiles and a part of one


def test_the_extension_is_built():
    assert native_rows.instruction_sets()[-1] == "baseline"


@pytest.fixture(params=native_rows.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(NativeRows, "instruction_set", request.param)
    return request.param


def inputs(num_rows: int = 40, spread: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "student_input": torch.randn(num_rows, 16, generator=g).to(dtype).requires_grad_(),
        "student_weight": (spread * torch.randn(VOCAB, 16, generator=g)).to(dtype).requires_grad_(),
        "teacher_input": torch.randn(num_rows, 24, generator=g).to(dtype),
        "teacher_weight": (spread * torch.randn(VOCAB, 24, generator=g)).to(dtype),
        "shift_labels": torch.randint(0, VOCAB, (num_rows,), generator=g),
    }


def run(tensors: dict[str, Tensor], **options) -> list[Tensor]:
    """Every field of the output, and the gradients."""
    output = fused_kd_loss(**tensors, **options)
    grads = torch.autograd.grad(output.loss.sum(), [t for t in tensors.values() if t.requires_grad])
    return [*(value.detach() for value in output), *grads]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[slice]:
    """The chunks that went through the native rows."""
    seen: list[slice] = []
    native = NativeRows.run

    def noting(self: NativeRows, group_start: int, chunk: slice) -> None:
        seen.append(chunk)
        native(self, group_start, chunk)

    monkeypatch.setattr(NativeRows, "run", noting)
    return seen


def check(
    tensors: dict[str, Tensor], calls: list[slice], monkeypatch: pytest.MonkeyPatch, rounding: float = 2e-6, **options
) -> None:
    """Every result at most half again as far from fp64's as the torch rows' is, but for rounding."""
    native = run(tensors, **options)
    assert calls
    with monkeypatch.context() as patch:
        patch.setattr(NativeRows, "covers", lambda *_: False)
        torchs = run(tensors, **options)
    wide = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    for found, other, exact in zip(native, torchs, run(wide, backend="reference", **options), strict=True):
        scale = exact.double().abs().max().clamp(min=1.0)
        error, allowed = (found - exact).abs().max(), (other - exact).abs().max()
        assert error <= 1.5 * allowed + rounding * scale


@pytest.mark.parametrize("divergence", POINTWISE)
@pytest.mark.parametrize("options", [{}, {"ce_weight": 0.3}, {"ce_weight": 0.3, "temperature": 2.0}], ids=str)
def test_as_torch(divergence: str, options: dict, instruction_set: str, calls, monkeypatch):
    check(inputs(), calls, monkeypatch, divergence=divergence, reduction="none", **options)


@pytest.mark.parametrize("divergence", POINTWISE)
def test_a_student_all_but_equal_to_its_teacher(divergence: str, instruction_set: str, calls, monkeypatch):
    """Differences of 1e-3 in the logits, where f and its derivative are small differences of large numbers."""
    tensors = inputs()
    tensors["teacher_input"] = tensors["student_input"].detach()
    noise = torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(1))
    tensors["teacher_weight"] = (tensors["student_weight"] + 1e-3 * noise).detach()
    check(tensors, calls, monkeypatch, divergence=divergence)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_and_infinity_show_in_their_row_alone(side: str, value: float, dtype, instruction_set: str, calls):
    tensors = inputs(dtype=dtype)
    with torch.no_grad():
        tensors[f"{side}_input"][7, 3] = value
    loss = fused_kd_loss(**tensors, ce_weight=0.1, reduction="none").loss
    assert calls
    if side == "student":
        assert loss[7].isnan()
    else:
        assert not loss[7].isfinite()
    assert loss[:7].isfinite().all()
    assert loss[8:].isfinite().all()


def test_masked_tokens(instruction_set: str, calls, monkeypatch):
    bias = torch.zeros(VOCAB)
    bias[: VOCAB // 2] = -math.inf  # the whole first tile
    tensors = {**inputs(), "student_bias": bias, "teacher_bias": bias}
    tensors["shift_labels"] = tensors["shift_labels"] % (VOCAB // 2) + VOCAB // 2
    check(tensors, calls, monkeypatch, ce_weight=0.2)


@pytest.mark.parametrize("spread", [0.0, 30.0, 300.0])
def test_flat_and_peaked_rows(spread: float, instruction_set: str, calls, monkeypatch):
    """Where all logits are equal the first one is the most likely; where one rules the others' exponentials vanish."""
    # Logits reach ten times the spread, and the last digit of the largest is worth so much more.
    rounding = 2e-6 * max(1.0, spread)
    check(inputs(spread=spread), calls, monkeypatch, rounding, divergence="jsd", ce_weight=0.2)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads: int, calls):
    wanted = run(inputs(), divergence="jsd")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = run(inputs(), divergence="jsd")
    finally:
        torch.set_num_threads(before)
    for a, b in zip(found[:2], wanted[:2], strict=True):
        assert torch.equal(a, b)


def test_a_default_device_elsewhere(calls):
    wanted = run(inputs())
    tensors = inputs()
    with torch.device("meta"):
        found = run(tensors)
    assert calls
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_tensors_that_hold_no_memory_of_their_own_are_left_to_torch(calls):
    tensors, options = inputs(), {"ce_weight": 0.3, "reduction": "sum"}
    wanted = fused_kd_loss(**tensors, **options).loss
    calls.clear()
    labels, weight = tensors.pop("shift_labels"), torch.ones(40)
    of_labels = fused_kd_loss(**tensors, shift_labels=TwoTensor(labels, labels), **options).loss
    of_weight = fused_kd_loss(**tensors, shift_labels=labels, row_weight=TwoTensor(weight, weight), **options).loss
    assert not calls
    torch.testing.assert_close(of_labels, wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(of_weight.a, wanted, rtol=1e-5, atol=1e-4)


def test_a_divergence_of_ones_own_and_fp64_are_left_to_torch(calls):
    @register_divergence("test_native_rows_own")
    @dataclasses.dataclass(frozen=True)
    class Own(Divergence):
        def pointwise(self, log_p, log_q):
            return log_p.exp() * (log_p - log_q), -log_p.exp()

    own = fused_kd_loss(**inputs(), divergence=Own()).loss
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs().items()}
    fused_kd_loss(**wide)
    assert not calls
    torch.testing.assert_close(own, fused_kd_loss(**inputs()).loss, rtol=1e-5, atol=1e-6)
    assert calls
