"""Compiled layers: the same numbers, and no graph beyond those of the first microbatch and evaluation."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from support.ranks import run_on_ranks
from support.student import Rows, load_samples, make_student, rank_steps, whole


def train(folder: Path, options: dict[str, Any]):
    """Steps that differ in numbers, lengths and sum of samples; (losses, first gradient, graphs after each step)."""
    student, rows = make_student(str(folder / "student"), str(folder / "teacher"), **options), Rows(folder)
    losses, gradients, graphs = [], {}, []
    for step in rank_steps(
        load_samples(folder),
        num_steps=5,
        samples_per_step=6,
        tokens_per_microbatch=200,
    ):
        for microbatch in step.microbatches:
            own_rows = partial(rows, microbatch)
            last = microbatch is step.microbatches[-1]
            output = student.forward_backward(microbatch, own_rows, num_items=step.num_loss_tokens, last=last)
            losses.append(output.loss.item())
        if step.index == 0:
            gradients = {n: whole(p.grad).clone() for n, p in student.model.named_parameters()}
        student.optimizer_step(step.index)
        losses.append(student.evaluate(microbatch, own_rows, num_items=step.num_loss_tokens).kd_loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
        torch._dynamo.config.error_on_recompile = True
    torch._dynamo.config.error_on_recompile = False
    return losses, gradients, graphs


def train_both(folder: Path, backend: str, options: dict[str, Any]):
    torch._dynamo.reset()  # another test of this process may have compiled the same layers
    counters.clear()
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        return train(folder, options), train(folder, {**options, "compile": True})


soak = pytest.mark.soak


@pytest.mark.parametrize(
    "num_ranks, backend, options",
    [
        (1, "aot_eager", {}),  # inductor takes a minute for its C++
        (1, "aot_eager", {"activation_checkpointing": "selective"}),
        pytest.param(1, "inductor", {}, marks=soak),
        pytest.param(2, "inductor", {}, marks=soak),
        pytest.param(1, "inductor", {"activation_checkpointing": "full"}, marks=soak),
        pytest.param(1, "inductor", {"activation_checkpointing": "selective"}, marks=soak),
        pytest.param(2, "inductor", {"activation_checkpointing": "selective"}, marks=soak),
        pytest.param(2, "aot_eager", {"activation_checkpointing": "selective", "cpu_offload": True}, marks=soak),
    ],
)
def test_compiled_equals_eager(
    tiny: Path, tmp_path: Path, num_ranks: int, backend: str, options: dict[str, Any]
) -> None:
    for eager, compiled in run_on_ranks(num_ranks, tmp_path / "ranks", train_both, tiny, backend, options):
        assert compiled[0] == pytest.approx(eager[0], rel=1e-5)
        for name, gradient in eager[1].items():
            assert (compiled[1][name] - gradient).norm() < 1e-5 * gradient.norm(), name
        assert eager[2] == [0] * 5
        assert compiled[2] == [8] * 5  # before and after attention, of a layer and of its attention; without gradients
