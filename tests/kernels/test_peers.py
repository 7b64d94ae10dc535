"""The same numbers as the libraries whose conventions we keep, where they define the same loss."""

from __future__ import annotations

import pytest
import torch

from kdflow_kernels import JSD, fused_kd_loss


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {
        "student_input": torch.randn(12, 8, generator=g).requires_grad_(),
        "student_weight": torch.randn(50, 8, generator=g).requires_grad_(),
        "teacher_input": torch.randn(12, 10, generator=g),
        "teacher_weight": torch.randn(50, 10, generator=g),
        "shift_labels": torch.randint(0, 50, (12,), generator=g).index_fill_(0, torch.tensor([2, 7]), -100),
    }


def gradients(loss: torch.Tensor, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, [tensors["student_input"], tensors["student_weight"]]))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_trl_generalized_jsd_loss(beta: float, temperature: float, tensors: dict[str, torch.Tensor]):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student = tensors["student_input"] @ tensors["student_weight"].T
    teacher = tensors["teacher_input"] @ tensors["teacher_weight"].T
    theirs = gkd.GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], labels=tensors["shift_labels"][None], beta=beta, temperature=temperature
    )
    ours = fused_kd_loss(**tensors, divergence=JSD(beta=beta), temperature=temperature).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", [(0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_liger_chunked_jsd(beta: float, weights: tuple[float, float], tensors: dict[str, torch.Tensor]):
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    hard, soft = weights
    # Liger's soft loss sums over ignored rows as well: leave none.
    tensors["shift_labels"].clamp_(min=0)
    loss = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=hard, weight_soft_loss=soft, beta=beta, temperature=2.0, compiled=False, chunk_size=4
    )
    t = tensors
    theirs = loss(t["student_input"], t["student_weight"], t["teacher_input"], t["teacher_weight"], t["shift_labels"])
    ours = fused_kd_loss(**t, divergence=JSD(beta=beta), temperature=2.0, kd_weight=soft, ce_weight=hard).loss
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(ours, t), gradients(theirs, t), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
