"""Forms of a kernel that spill get more registers: once, at their first launch."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_triton_backend import DIVERGENCES, bf16_case

from kdflow_kernels import fused_kd_loss, registers


class Kernel:
    """Stands for a Triton kernel on a GPU: spills with fewer than `needed` registers."""

    def __init__(self, needed: int) -> None:
        self.needed, self.calls, self.fn = needed, [], self

    def __getitem__(self, grid):
        return lambda **arguments: self._made("launch", arguments)

    def warmup(self, *, grid, **arguments):
        return self._made("warmup", arguments)

    def _made(self, how: str, arguments: dict):
        allowance = arguments.get("maxnreg")
        self.calls.append((how, allowance))
        taken = min(allowance or 64, self.needed)
        return SimpleNamespace(n_regs=taken, n_spills=self.needed - taken, _init_handles=lambda: None)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(registers, "_allowances", {})


@pytest.mark.parametrize(
    "needed, allowance, first, then",
    [
        (60, None, [("launch", None)], None),
        (70, None, [("launch", None), ("warmup", 80)], 80),
        (200, None, [("launch", None), ("warmup", 80), ("warmup", 128), ("warmup", 255)], 255),
        (120, 128, [("launch", 128)], 128),
        (400, 128, [("launch", 128), ("warmup", 255)], 255),
    ],
)
def test_a_form_that_spills_is_compiled_again_once(needed: int, allowance: int | None, first: list, then: int | None):
    kernel = Kernel(needed)
    arguments = {"logits": torch.zeros(2), "LANES": 32, "V": 7, "scale": 0.5}
    registers.launch(kernel, (1,), arguments, allowance=allowance)
    assert kernel.calls == first
    registers.launch(kernel, (1,), {**arguments, "scale": 0.7}, allowance=allowance)
    assert kernel.calls[len(first) :] == [("launch", then)]


def test_another_form_starts_anew():
    kernel = Kernel(70)
    for lanes, dtype in ((32, torch.float32), (64, torch.float32), (32, torch.bfloat16)):
        kernel.calls.clear()
        registers.launch(kernel, (1,), {"logits": torch.zeros(2, dtype=dtype), "LANES": lanes})
        assert kernel.calls == [("launch", None), ("warmup", 80)]


@pytest.mark.gpu
class TestOnTheGPU:
    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_nothing_changes_from_the_first_launch_to_the_next(self, divergence: str):
        """With everything that takes registers; the first launch may spill, the others have what they need."""
        case = bf16_case(
            300, 50_000, 128, 128, divergence=divergence, ce_weight=0.3, temperature=1.5, student_softcap=20.0,
            teacher_softcap=20.0, student_logit_scale=0.7, teacher_logit_scale=0.8,
        )  # fmt: skip
        case.tensors["student_bias"] = torch.randn(50_000, device="cuda").bfloat16()
        case.tensors["teacher_bias"] = torch.randn(50_000, device="cuda").bfloat16()
        first = fused_kd_loss(**case.tensors, **case.options)
        gradients = case.gradients(first.loss)
        for _ in range(2):
            again = fused_kd_loss(**case.tensors, **case.options)
            torch.testing.assert_close(again.loss, first.loss, rtol=1e-6, atol=0)
            for name, gradient in case.gradients(again.loss).items():
                torch.testing.assert_close(gradient, gradients[name])
        assert registers._allowances
