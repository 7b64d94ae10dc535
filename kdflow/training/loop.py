"""The training loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

import torch

from kdflow.data import Step
from kdflow.errors import TrainingError
from kdflow.training.metrics import EvalMetrics, StepMetrics, Totals, WaitTimer, perplexity
from kdflow.training.schedule import Evaluation
from kdflow.types import Microbatch
from kdflow_kernels import KDLossOutput

TeacherRows = Callable[[], torch.Tensor]


class Student(Protocol):
    """What the loop needs of a student."""

    num_ranks: int

    def forward_backward(
        self, microbatch: Microbatch, teacher_rows: TeacherRows, *, num_items: float, last: bool
    ) -> KDLossOutput: ...

    def optimizer_step(self, index: int) -> tuple[torch.Tensor, float]: ...

    def evaluate(self, microbatch: Microbatch, teacher_rows: TeacherRows, *, num_items: float) -> KDLossOutput: ...


class HiddenRows(Protocol):
    """Teacher rows of one microbatch: a context manager that frees their slot."""

    microbatch: Microbatch

    @property
    def prefill_s(self) -> float: ...

    def tensor(self) -> torch.Tensor: ...

    def __enter__(self) -> HiddenRows: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class HiddenStates(Protocol):
    """Where teacher rows come from."""

    def prefetch(self, microbatches: Iterator[Microbatch]) -> Iterator[HiddenRows]: ...


class Observer(Protocol):
    """Hears of every step and evaluation."""

    def on_step(self, metrics: StepMetrics) -> None: ...

    def on_eval(self, metrics: EvalMetrics) -> None: ...


class Trainer:
    """Runs a plan on one rank.

    Args:
        student: what is trained.
        hidden_states: where teacher rows come from.
        observers: told of metrics, on every rank.
        save: called with the number of finished steps whenever a checkpoint is due.
        save_every: steps between checkpoints; 0 for none but the last.
        stop_requested: asked after each step; any rank's yes stops all.
    """

    def __init__(
        self,
        student: Student,
        hidden_states: HiddenStates,
        *,
        device: torch.device,
        observers: list[Observer],
        save: Callable[[int], object],
        save_every: int,
        stop_requested: Callable[[], bool],
    ) -> None:
        self._student = student
        self._hidden_states = hidden_states
        self._device = device
        self._clock = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._observers = observers
        self._save = save
        self._save_every = save_every
        self._stop_requested = stop_requested

    def run(self, plan: Iterator[Step | Evaluation]) -> bool:
        """Works the plan off and saves; False where it was asked to stop before the end.

        Raises:
            TrainingError: the loss is not finite.
        """
        work, ahead = itertools.tee(plan)
        rows = self._hidden_states.prefetch(m for item in ahead for m in item.microbatches)
        num_steps_done = num_steps_saved = 0
        stopped = False
        for item in work:
            if isinstance(item, Evaluation):
                self._evaluate(item, rows)
                continue
            stopped = self._train(item, rows)
            num_steps_done = item.index + 1
            if stopped or (self._save_every and num_steps_done % self._save_every == 0):
                self._save(num_steps_saved := num_steps_done)
            if stopped:
                return False
        if num_steps_done > num_steps_saved:
            self._save(num_steps_done)
        return True

    def _train(self, step: Step, rows: Iterator[HiddenRows]) -> bool:
        totals = Totals(self._device)
        for microbatch in step.microbatches:
            with next(rows) as pending:
                assert pending.microbatch is microbatch
                teacher_rows = WaitTimer(pending.tensor, self._clock)
                output = self._student.forward_backward(
                    microbatch,
                    teacher_rows,
                    num_items=step.num_loss_tokens,
                    last=microbatch is step.microbatches[-1],
                )
                totals.add(
                    output,
                    microbatch.num_loss_tokens,
                    prefill_s=pending.prefill_s,
                    wait=teacher_rows,
                )
        grad_norm, learning_rate = self._student.optimizer_step(step.index)
        means, stop = totals.reduce(
            step.num_loss_tokens,
            loss_scale=1.0 / self._student.num_ranks,
            stop=self._stop_requested(),
        )
        norm = grad_norm.item()
        if not (abs(means["loss"]) < float("inf") and norm < float("inf")):
            ids = [i for m in step.microbatches for i in m.sample_ids]
            raise TrainingError(
                f"step {step.index + 1}: loss {means['loss']}, gradient norm {norm}; this rank's "
                f"samples are {ids}. Lower optimizer.learning_rate or look at these rows"
            )
        metrics = StepMetrics(
            step=step.index + 1,
            epoch=step.epoch,
            loss=means["loss"],
            kd_loss=means["kd_loss"],
            ce_loss=means["ce_loss"],
            student_entropy=means["student_entropy"],
            teacher_entropy=means["teacher_entropy"],
            top1_agreement=means["top1_agreement"],
            grad_norm=norm,
            learning_rate=learning_rate,
            num_tokens=step.num_tokens,
            num_loss_tokens=step.num_loss_tokens,
            step_s=means["seconds"],
            student_tokens_per_s=step.num_tokens / means["seconds"],
            teacher_tokens_per_s=step.num_tokens / max(means["prefill_s"], 1e-9),
            teacher_wait_s=means["wait_s"],
        )
        for observer in self._observers:
            observer.on_step(metrics)
        return stop

    def _evaluate(self, evaluation: Evaluation, rows: Iterator[HiddenRows]) -> None:
        totals = Totals(self._device)
        for microbatch in evaluation.microbatches:
            with next(rows) as pending:
                assert pending.microbatch is microbatch
                output = self._student.evaluate(microbatch, pending.tensor, num_items=evaluation.num_loss_tokens)
                totals.add(output, microbatch.num_loss_tokens, prefill_s=pending.prefill_s)
        means, _ = totals.reduce(evaluation.num_loss_tokens, loss_scale=1.0)
        metrics = EvalMetrics(
            step=evaluation.num_steps_done,
            kl=means["kd_loss"],
            ce_loss=means["ce_loss"],
            perplexity=perplexity(means["ce_loss"]),
            top1_agreement=means["top1_agreement"],
            num_loss_tokens=evaluation.num_loss_tokens,
            eval_s=means["seconds"],
        )
        for observer in self._observers:
            observer.on_eval(metrics)
