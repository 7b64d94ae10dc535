"""A student whose head is cut over ranks; that it trains as a whole one is in test_fsdp2_layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import go_on, weights_of
from transformers import LlamaForCausalLM

from kdflow.data import training_steps
from kdflow.errors import ConfigError
from support.ranks import run_on_ranks
from support.student import Rows, load_samples, make_student, rank_steps
from support.tiny import make_config

PARALLEL = {"vocab_parallel": True}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(5)
    LlamaForCausalLM(make_config(num_layers=2, tied=False)).save_pretrained(folder)
    return str(folder)


def shapes_of_heads(folder: Path, model: str) -> list[tuple[int, ...]]:
    """This rank's part of the student's head, of its gradient and of the teacher's head."""
    with pytest.raises(ConfigError, match="tied to its embeddings"):
        make_student(str(folder / "student"), str(folder / "teacher"), **PARALLEL)
    student, rows = make_student(model, str(folder / "teacher"), **PARALLEL), Rows(folder)
    (step,) = training_steps(load_samples(folder), num_steps=1, samples_per_step=2, tokens_per_microbatch=512, seed=0)
    (microbatch,) = step.microbatches
    student.forward_backward(microbatch, lambda: rows(microbatch), num_items=step.num_loss_tokens, last=True)
    weight = student.model.get_output_embeddings().weight
    parts = (weight.to_local(), weight.grad.to_local(), student.module._teacher_heads[""].weight)
    return [tuple(part.shape) for part in parts]


def test_no_rank_has_a_whole_head(tiny: Path, tmp_path: Path, untied: str) -> None:
    for shapes in run_on_ranks(3, tmp_path / "ranks", shapes_of_heads, tiny, untied):
        assert shapes == [(128, 48)] * 3


def one_step(folder: Path, model: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights after a step of two samples."""
    student, rows = make_student(model, str(folder / "teacher"), **options), Rows(folder)
    (step,) = rank_steps(
        load_samples(folder),
        num_steps=1,
        samples_per_step=2,
        tokens_per_microbatch=512,
    )
    (microbatch,) = step.microbatches
    student.forward_backward(microbatch, lambda: rows(microbatch), num_items=step.num_loss_tokens, last=True)
    student.optimizer_step(0)
    return weights_of(student)


def test_a_replica_without_a_loss_row_takes_part(tiny: Path, tmp_path: Path, untied: str) -> None:
    (expected,) = run_on_ranks(1, tmp_path / "one", one_step, tiny, untied, {})
    for found in run_on_ranks(4, tmp_path / "four", one_step, tiny, untied, {**PARALLEL, "replicate": 2}):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_goes_on_with_whole_heads(tiny: Path, tmp_path: Path, untied: str) -> None:
    store = tmp_path / "store"
    (losses, weights), _ = run_on_ranks(2, tmp_path / "two", go_on, tiny, untied, store, PARALLEL, 0, (4,))
    ((again, resumed),) = run_on_ranks(1, tmp_path / "one", go_on, tiny, untied, store, {}, 4, ())
    assert again == pytest.approx(losses[4:], rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(resumed[name], weight, atol=1e-5, rtol=1e-4)
