from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from kdflow.algorithms import ALGORITHMS, ModelInfo
from kdflow.config import AlgorithmConfig, OptimizerConfig, StudentConfig
from kdflow.data import pack_step
from kdflow.student import FSDP2Student
from kdflow.training import NoTeacher
from kdflow.types import LMHead
from support.ranks import run_on_ranks
from support.student import CPU, load_samples


def loss_and_gradients(folder: Path):
    """Of six samples in packed microbatches, by the student."""
    algorithm = ALGORITHMS.get("sft")(AlgorithmConfig("sft"), student=ModelInfo("tiny", {}, 384), teacher=None)
    student = FSDP2Student(
        StudentConfig(str(folder / "student"), compute_dtype="float32"),
        OptimizerConfig(),
        algorithms={"": algorithm},
        teacher_heads={"": LMHead(torch.empty(0, 0))},
        device=CPU,
        num_steps=1,
    )
    step = pack_step(list(load_samples(folder)[:6]), tokens_per_microbatch=200)
    assert len(step.microbatches) > 1
    loss = 0.0
    for rows in NoTeacher().prefetch(iter([step.microbatches])):
        last = rows.microbatch is step.microbatches[-1]
        output = student.forward_backward(rows.microbatch, rows.tensor, num_items=step.num_loss_tokens, last=last)
        loss += output.loss.item()
    gradients = {n: p.grad for n, p in student.model.named_parameters()}
    return loss, {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items()}


def test_it_is_the_cross_entropy_of_transformers(tiny: Path, tmp_path: Path) -> None:
    ((loss, gradients),) = run_on_ranks(1, tmp_path / "ranks", loss_and_gradients, tiny)
    model = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float32)
    samples = list(load_samples(tiny)[:6])
    longest = max(len(s) for s in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        tokens, said = torch.from_numpy(sample.input_ids.copy()).long(), torch.from_numpy(sample.loss_mask.copy())
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        labels[row, : len(tokens)] = torch.where(said, tokens, -100)
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-6, rtol=1e-4)
