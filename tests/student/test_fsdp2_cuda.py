"""The student on one GPU beside the same student on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from kdflow.data import pack_step
from kdflow.launcher.rank import process_group
from support.student import CPU, Rows, load_samples, make_student, whole
from support.tiny import make_config

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Untied, with heads of 16 numbers, which the flash kernel takes (in half precision)."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(5)
    LlamaForCausalLM(make_config(num_layers=2, tied=False, hidden_size=64)).save_pretrained(folder)
    return str(folder)


def one_step(folder: Path, model: str, device: torch.device, compute_dtype: str):
    """Loss and gradients of a step in several microbatches, and the weights after it, on the CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with process_group(device, timeout_s=60.0):
        student = make_student(model, str(folder / "teacher"), device=device, compute_dtype=compute_dtype)
        rows = Rows(folder, device)
        step = pack_step(load_samples(folder)[:6], tokens_per_microbatch=150)
        assert len(step.microbatches) > 1
        loss = torch.zeros((), device=device)
        for microbatch in step.microbatches:
            output = student.forward_backward(
                microbatch,
                lambda m=microbatch: rows(m),
                num_items=step.num_loss_tokens,
                last=microbatch is step.microbatches[-1],
            )
            loss += output.loss.detach()
        named = list(student.model.named_parameters())
        gradients = {n: whole(p.grad).float().cpu().clone() for n, p in named if p.grad is not None}
        norm, _ = student.optimizer_step(1)
        weights = {n: whole(p.detach()).cpu().clone() for n, p in named}
        return loss.item(), norm.item(), gradients, weights


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_fp32_gradients_are_those_of_the_cpu(tiny: Path, wide: str, kind: str) -> None:
    """Within 2e-3 of each tensor's norm: the loss kernel may multiply in TF32 (eps 5e-4)."""
    model = str(tiny / "student") if kind == "tied" else wide
    loss, norm, ours, weights = one_step(tiny, model, CUDA, "float32")
    expected_loss, expected_norm, expected, _ = one_step(tiny, model, CPU, "float32")
    assert loss == pytest.approx(expected_loss, rel=1e-3)
    assert norm == pytest.approx(expected_norm, rel=2e-3)
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < 2e-3, (name, error)
    assert all(torch.isfinite(w).all() for w in weights.values())


def test_bf16_step_follows_fp32(tiny: Path, wide: str) -> None:
    """Loss within 2%, and gradients that point the same way (bfloat16 has 8 bits)."""
    loss, norm, ours, weights = one_step(tiny, wide, CUDA, "bfloat16")
    expected_loss, expected_norm, expected, _ = one_step(tiny, wide, CPU, "float32")
    assert loss == pytest.approx(expected_loss, rel=0.02)
    assert norm == pytest.approx(expected_norm, rel=0.05)
    for name, gradient in expected.items():
        cosine = torch.nn.functional.cosine_similarity(ours[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.98, (name, cosine)
    assert all(w.dtype == torch.float32 and torch.isfinite(w).all() for w in weights.values())
