"""Self-distillation: the frozen base of a LoRA student is the teacher, with a context that it alone reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from kdflow.config import DataConfig, LoraConfig
from kdflow.data import load_datasets
from kdflow.modeling import load_tokenizer
from support.ranks import run_on_ranks
from support.student import Rows, make_student, rank_steps, whole
from support.tiny import with_dropout

pytest.importorskip("peft")


def train(folder: Path, teacher: str | None, options: dict[str, Any]):
    """Losses, an evaluation and the adapters; `teacher` has rows of its own, without one it is the base."""
    torch.manual_seed(dist.get_rank())  # of adapters and dropout, of which the teacher has neither
    lora = LoraConfig(rank=4, dropout=0.1)
    student, rows = make_student(str(folder / "teacher"), teacher, lora=lora, **options), Rows(folder)
    data = DataConfig(
        str(folder / "rows.jsonl"), num_eval_samples=0, max_length=160, teacher_context="Answer as a pirate would."
    )
    samples = load_datasets(data, load_tokenizer(str(folder / "teacher")), 0)[0].samples
    losses = []
    for step in rank_steps(
        samples,
        num_steps=4,
        samples_per_step=4,
        tokens_per_microbatch=256,
    ):
        for m in step.microbatches:
            assert m.teacher is not None
            output = student.forward_backward(
                m,
                lambda m=m: rows(m.for_teacher()) if teacher else torch.empty(0, 0),
                num_items=step.num_loss_tokens,
                last=m is step.microbatches[-1],
            )
            losses += [output.loss.item(), output.kd_loss.item()]
        student.optimizer_step(step.index)
    losses.append(student.evaluate(m, lambda: rows(m.for_teacher()), num_items=step.num_loss_tokens).kd_loss.item())
    return losses, {n: whole(p.detach()).clone() for n, p in student.model.named_parameters() if p.requires_grad}


def both(folder: Path, options: dict[str, Any]):
    return train(folder, None, options), train(folder, str(folder / "teacher"), options)


@pytest.mark.parametrize("num_ranks, options", [(1, {}), (2, {"activation_checkpointing": "full"})])
def test_base_is_a_teacher_like_any_other(tiny: Path, tmp_path: Path, num_ranks: int, options: dict[str, Any]) -> None:
    with_dropout(tiny / "student", tmp_path / "teacher")
    (tmp_path / "rows.jsonl").symlink_to(tiny / "conversations.jsonl")
    for (losses, adapters), (expected, of_teacher) in run_on_ranks(
        num_ranks, tmp_path / "ranks", both, tmp_path, options
    ):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert losses[1] > 1e-4, "the context says nothing"
        assert adapters.keys() == of_teacher.keys()
        assert all(".lora_" in name for name in adapters)
        for name, weight in adapters.items():
            torch.testing.assert_close(weight, of_teacher[name], atol=1e-5, rtol=1e-4)
