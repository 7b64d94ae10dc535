"""Families of models, dense and with experts, through one class: the eager gradient of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from kdflow.data import pack_step
from support.ranks import run_on_ranks
from support.student import CONFIG, Rows, load_samples, make_student, whole
from support.tiny import FAMILIES


def gradients(folder: Path, models: list[str]):
    """For each model, its gradient of one step over all ranks."""
    found = []
    for model in models:
        student, rows = make_student(model, str(folder / "teacher")), Rows(folder)
        step = pack_step(
            load_samples(folder)[:4], tokens_per_microbatch=9999, rank=dist.get_rank(), num_ranks=dist.get_world_size()
        )
        (microbatch,) = step.microbatches
        student.forward_backward(
            microbatch, lambda m=microbatch, r=rows: r(m), num_items=step.num_loss_tokens, last=True
        )
        found.append({n: whole(p.grad).clone() for n, p in student.model.named_parameters() if p.grad is not None})
    return found


def eager(folder: Path, model: str) -> dict[str, torch.Tensor]:
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    samples, total = load_samples(folder)[:4], torch.zeros(())
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids).long()
        rows = sample.loss_mask[1:].nonzero()[0].tolist()
        z = student(input_ids=ids[None]).logits[0, rows]
        with torch.no_grad():
            p = (teacher(input_ids=ids[None]).logits[0, rows] / CONFIG["temperature"]).log_softmax(-1)
        q = (z / CONFIG["temperature"]).log_softmax(-1)
        cross_entropy = torch.nn.functional.cross_entropy(z, ids[[r + 1 for r in rows]], reduction="sum")
        total = total + (p.exp() * (p - q)).sum() + CONFIG["ce_weight"] * cross_entropy
    (total / sum(sample.num_loss_tokens for sample in samples)).backward()
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_gradients_of_each_family(tiny: Path, tmp_path: Path, num_ranks: int) -> None:
    models = []
    for name, make in FAMILIES.items():
        torch.manual_seed(3)
        make().save_pretrained(tmp_path / name)
        models.append(str(tmp_path / name))
    ranks = run_on_ranks(num_ranks, tmp_path / "ranks", gradients, tiny, models)
    for number, model in enumerate(models):
        expected = eager(tiny, model)
        for found in ranks:
            assert found[number].keys() == expected.keys()
            for name, gradient in expected.items():
                error = (found[number][name] - gradient).norm() / gradient.norm()
                assert error < 1e-4, (model, name, error)
