from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from kdflow.data import pack_step, training_steps
from kdflow.errors import TrainingError
from kdflow.student import FSDP2Student
from kdflow.tracing import OFF
from kdflow.training import EvalMetrics, Evaluation, Save, StepMetrics, Trainer
from kdflow.types import Microbatch
from support.ranks import run_on_ranks
from support.student import CPU, Rows, load_samples, make_student


class BadRows:
    """Rows of the real teacher; those of one sample's microbatch are not numbers."""

    def __init__(self, rows: Rows, microbatch: Microbatch, bad_sample: int) -> None:
        self.microbatch = microbatch
        self.prefill_s, self.waited_s = 0.1, 0.0
        self._rows, self._bad_sample = rows, bad_sample

    def tensor(self) -> torch.Tensor:
        rows = self._rows(self.microbatch)
        return rows.fill_(math.nan) if self._bad_sample in self.microbatch.sample_ids else rows

    def release(self) -> None:
        pass

    def __enter__(self) -> BadRows:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class Source:
    def __init__(self, rows: Rows, bad_sample: int) -> None:
        self._rows, self._bad_sample = rows, bad_sample

    def prefetch(self, work):
        return (BadRows(self._rows, m, self._bad_sample) for microbatches in work for m in microbatches)


class Seen:
    """Notes what it is told, and the state after each step; keeps no checkpoints."""

    def __init__(self, student: FSDP2Student) -> None:
        self._student = student
        self.losses: list[float] = []
        self.counts: list[int] = []
        self.warnings: list[str] = []
        self.states: list[list[torch.Tensor]] = []
        self.saved: list[int] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.losses.append(metrics.loss)
        self.counts.append(metrics.num_skipped)
        state = get_optimizer_state_dict(self._student.module, self._student.optimizer)["state"]
        moments = [t for values in state.values() for t in values.values()]  # type: ignore[union-attr]
        self.states.append([_local(t).clone() for t in (*self._student.module.parameters(), *moments)])

    def on_eval(self, metrics: EvalMetrics) -> None:
        raise AssertionError

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)

    def save(self, num_steps_done: int, *, num_skipped: int, score: float | None) -> None:
        self.saved.append(num_steps_done)

    def is_best(self, score: float) -> bool:
        return False

    def poll(self) -> None:
        return None

    def wait(self) -> None:
        pass


class SeenEvaluation(Seen):
    def on_eval(self, metrics: EvalMetrics) -> None:
        self.losses.append(metrics.score)


def _local(tensor: Any) -> torch.Tensor:
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def train_with_a_bad_step(folder: Path, max_skipped_steps: int) -> dict[str, Any]:
    samples = list(load_samples(folder)[:12])
    student, rows = make_student(str(folder / "student"), str(folder / "teacher")), Rows(folder)
    order = list(
        training_steps(
            samples,
            num_steps=3,
            samples_per_step=4,
            tokens_per_microbatch=256,
            seed=0,
            rank=dist.get_rank(),
            num_ranks=dist.get_world_size(),
        )
    )
    bad = [i for m in order[1].microbatches for i in m.sample_ids][:1]
    dist.broadcast_object_list(bad, src=0)  # a sample of rank 0 in the second of three steps

    seen = Seen(student)
    trainer = Trainer(
        student,
        Source(rows, bad[0]),
        device=CPU,
        observers=[seen],
        checkpoints=seen,
        max_skipped_steps=max_skipped_steps,
        stop_requested=lambda: False,
        trace=OFF,
    )
    error = ""
    try:
        assert trainer.run(iter(order))
    except TrainingError as caught:
        error = str(caught)
    return {**{n: v for n, v in vars(seen).items() if not n.startswith("_")}, "error": error, "bad": bad[0]}


def train_with_both_limits(folder: Path) -> list[dict[str, Any]]:
    return [train_with_a_bad_step(folder, limit) for limit in (1, 0)]


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_step_that_is_not_finite_moves_nothing(tiny: Path, tmp_path: Path, num_ranks: int) -> None:
    """The bad sample is one of rank 0; every rank skips, and where that is too much, every rank ends."""
    errors = set()
    for found, ended in run_on_ranks(num_ranks, tmp_path / "ranks", train_with_both_limits, tiny):
        assert [math.isfinite(loss) for loss in found["losses"]] == [True, False, True]
        assert found["counts"] == [0, 1, 1]
        before, skipped, after = found["states"]
        assert all(torch.equal(a, b) for a, b in zip(before, skipped, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(skipped, after, strict=True))
        assert all(t.isfinite().all() for t in after)
        (warning,) = found["warnings"]
        assert warning.startswith("step 2: loss nan")
        assert f"{found['bad']}" in warning
        assert found["error"] == ""

        errors.add(ended["error"])
        assert ended["error"].startswith("step 2: loss nan, gradient norm nan, expected finite numbers; its samples")
        assert ended["saved"] == [1]
        assert len(ended["losses"]) == 1
    assert len(errors) == 1


def stop_in_an_evaluation(folder: Path) -> dict[str, Any]:
    """Of the last rank alone."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    student, rows = make_student(str(folder / "student"), str(folder / "teacher")), Rows(folder)
    held = pack_step(list(load_samples(folder)[:4]), tokens_per_microbatch=256, rank=rank, num_ranks=num_ranks)
    evaluation = Evaluation(5, held.microbatches, held.num_loss_tokens, held.loss_tokens)
    seen = SeenEvaluation(student)

    trainer = Trainer(
        student,
        Source(rows, -1),
        device=CPU,
        observers=[seen],
        checkpoints=seen,
        stop_requested=lambda: rank == num_ranks - 1,
        trace=OFF,
    )
    finished = trainer.run(iter([evaluation, Save(5, due=False), evaluation]))
    return {"finished": finished, "saved": seen.saved, "num_evaluations": len(seen.losses)}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_stop_in_an_evaluation(tiny: Path, tmp_path: Path, num_ranks: int) -> None:
    """All ranks save what they have at its end, and do nothing more."""
    for found in run_on_ranks(num_ranks, tmp_path / "ranks", stop_in_an_evaluation, tiny):
        assert found == {"finished": False, "saved": [5], "num_evaluations": 1}
