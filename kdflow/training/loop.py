"""The training loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Protocol

import torch

from kdflow.data import Step
from kdflow.errors import TrainingError
from kdflow.tracing import Trace
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
        trace: gets the phases of each step; the student itself says where backward begins.
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
        trace: Trace,
    ) -> None:
        self._student = student
        self._hidden_states = hidden_states
        self._device = device
        self._clock = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._observers = observers
        self._save = save
        self._save_every = save_every
        self._stop_requested = stop_requested
        self._trace = trace
        self._num_microbatches_done = 0

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
                with self._trace.span("eval"):
                    self._evaluate(item, rows)
                continue
            with self._trace.span("step", step=item.index + 1):
                stopped = self._train(item, rows)
            self._trace.end_of_step()
            num_steps_done = item.index + 1
            if stopped or (self._save_every and num_steps_done % self._save_every == 0):
                with self._trace.span("save"):
                    self._save(num_steps_saved := num_steps_done)
            if stopped:
                return False
        if num_steps_done > num_steps_saved:
            with self._trace.span("save"):
                self._save(num_steps_done)
        return True

    @contextmanager
    def _next(self, rows: Iterator[HiddenRows], microbatch: Microbatch) -> Iterator[HiddenRows]:
        """The teacher rows of `microbatch`; their slot is given back at the end."""
        with self._trace.span("microbatch", ticket=self._num_microbatches_done, tokens=microbatch.num_tokens):
            self._trace.phase("request")
            with next(rows) as pending:
                assert pending.microbatch is microbatch
                self._trace.phase("forward")
                yield pending
                self._trace.phase("release")
        self._num_microbatches_done += 1

    def _received(self, pending: HiddenRows) -> torch.Tensor:
        self._trace.phase("receive wait", ticket=self._num_microbatches_done)
        tensor = pending.tensor()
        self._trace.phase("loss")
        return tensor

    def _train(self, step: Step, rows: Iterator[HiddenRows]) -> bool:
        totals = Totals(self._device)
        for microbatch in step.microbatches:
            with self._next(rows, microbatch) as pending:
                teacher_rows = WaitTimer(partial(self._received, pending), self._clock)
                output = self._student.forward_backward(
                    microbatch,
                    teacher_rows,
                    num_items=step.num_loss_tokens,
                    last=microbatch is step.microbatches[-1],
                )
                self._trace.phase("metrics")
                totals.add(
                    output,
                    microbatch.num_loss_tokens,
                    prefill_s=pending.prefill_s,
                    wait=teacher_rows,
                )
        self._trace.phase("optimizer step")
        grad_norm, learning_rate = self._student.optimizer_step(step.index)
        self._trace.phase("metrics")
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
            with self._next(rows, microbatch) as pending:
                received = partial(self._received, pending)
                output = self._student.evaluate(microbatch, received, num_items=evaluation.num_loss_tokens)
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
