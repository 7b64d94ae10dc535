"""The training loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Protocol

import torch
import torch.distributed as dist

from kdflow.data import Step
from kdflow.errors import TrainingError
from kdflow.tracing import Trace
from kdflow.training.metrics import EvalMetrics, Means, StepMetrics, Totals, WaitTimer, perplexity
from kdflow.training.schedule import Evaluation, Save
from kdflow.types import Microbatch
from kdflow_kernels import KDLossOutput

TeacherRows = Callable[[], torch.Tensor]


class Student(Protocol):
    """What the loop needs of a student."""

    num_ranks: int

    def forward_backward(
        self,
        microbatch: Microbatch,
        teacher_rows: TeacherRows,
        *,
        num_items: float,
        last: bool,
        release: Callable[[], None],
    ) -> KDLossOutput: ...

    def optimizer_step(self, index: int, accept: Callable[[torch.Tensor], bool]) -> tuple[torch.Tensor, float]: ...

    def evaluate(self, microbatch: Microbatch, teacher_rows: TeacherRows, *, num_items: float) -> KDLossOutput: ...


class HiddenRows(Protocol):
    """Teacher rows of one microbatch: a context manager that frees their slot."""

    microbatch: Microbatch
    waited_s: float

    @property
    def prefill_s(self) -> float: ...

    def tensor(self) -> torch.Tensor: ...

    def release(self) -> None: ...

    def __enter__(self) -> HiddenRows: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class HiddenStates(Protocol):
    """Where teacher rows come from."""

    def prefetch(self, work: Iterator[Sequence[Microbatch]]) -> Iterator[HiddenRows]: ...


class Checkpoints(Protocol):
    """Where the state of a run is kept; the same calls on every rank."""

    def save(self, num_steps_done: int, *, num_skipped: int, score: float | None) -> None: ...

    def is_best(self, score: float) -> bool: ...

    def poll(self) -> str | None: ...

    def wait(self) -> None: ...


class Observer(Protocol):
    """Hears of every step and evaluation, and of what went wrong without ending the run."""

    def on_step(self, metrics: StepMetrics) -> None: ...

    def on_eval(self, metrics: EvalMetrics) -> None: ...

    def on_warning(self, text: str) -> None: ...


class Trainer:
    """Runs a plan on one rank.

    Args:
        student: what is trained.
        hidden_states: where teacher rows come from.
        observers: told of metrics, on every rank.
        checkpoints: told when to save.
        max_skipped_steps: how many steps of the run may be dropped because their numbers are not finite.
        stop_requested: asked after each step and evaluation; any rank's yes stops all.
        trace: gets the phases of each step.
    """

    def __init__(
        self,
        student: Student,
        hidden_states: HiddenStates,
        *,
        device: torch.device,
        observers: list[Observer],
        checkpoints: Checkpoints,
        max_skipped_steps: int = 0,
        stop_requested: Callable[[], bool],
        trace: Trace,
    ) -> None:
        self._student = student
        self._hidden_states = hidden_states
        self._device = device
        self._clock = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._observers = observers
        self._checkpoints = checkpoints
        self._max_skipped_steps = max_skipped_steps
        self._stop_requested = stop_requested
        self._trace = trace
        self._num_microbatches_done = 0
        self._num_skipped = 0

    def run(self, plan: Iterator[Step | Evaluation | Save], *, num_skipped: int = 0) -> bool:
        """Works the plan off; False where it was asked to stop before the end, and then it has saved.

        Args:
            num_skipped: steps that were dropped before the plan begins.

        Raises:
            TrainingError: too many steps with a loss or gradient that is not finite.
            CheckpointError: the last checkpoint could not be written.
        """
        work, ahead = itertools.tee(plan)
        rows = self._hidden_states.prefetch(item.microbatches for item in ahead)
        self._num_skipped = num_skipped
        score: float | None = None
        for item in work:
            if (warning := self._checkpoints.poll()) is not None:
                self._warn(warning)
            if isinstance(item, Evaluation):
                with self._trace.span("eval"):
                    score, stopped = self._evaluate(item, rows)
                if stopped:
                    return self._stop(item.num_steps_done, score)
            elif isinstance(item, Save):
                if item.due or (score is not None and self._checkpoints.is_best(score)):
                    self._save(item.num_steps_done, score)
            else:
                score = None
                with self._trace.span("step", step=item.index + 1):
                    stopped = self._train(item, rows)
                self._trace.end_of_step()
                if stopped:
                    return self._stop(item.index + 1)
        self._checkpoints.wait()
        return True

    def _stop(self, num_steps_done: int, score: float | None = None) -> bool:
        self._save(num_steps_done, score)
        self._checkpoints.wait()
        return False

    def _save(self, num_steps_done: int, score: float | None = None) -> None:
        with self._trace.span("save"):
            self._checkpoints.save(num_steps_done, num_skipped=self._num_skipped, score=score)

    def _warn(self, text: str) -> None:
        for observer in self._observers:
            observer.on_warning(text)

    @contextmanager
    def _next(self, rows: Iterator[HiddenRows], microbatch: Microbatch) -> Iterator[HiddenRows]:
        """The teacher rows of `microbatch`; their slot is given back at the end, if it was not before."""
        with self._trace.span("microbatch", ticket=self._num_microbatches_done, tokens=microbatch.num_tokens):
            self._trace.phase("request")
            with next(rows) as pending:
                assert pending.microbatch is microbatch
                self._trace.phase("forward")
                yield pending
        self._num_microbatches_done += 1

    def _received(self, pending: HiddenRows) -> torch.Tensor:
        self._trace.phase("receive wait", ticket=self._num_microbatches_done)
        tensor = pending.tensor()
        self._trace.phase("loss")
        return tensor

    def _release(self, pending: HiddenRows, then: str) -> None:
        self._trace.phase("release", ticket=self._num_microbatches_done)
        pending.release()
        self._trace.phase(then)

    def _train(self, step: Step, rows: Iterator[HiddenRows]) -> bool:
        totals = Totals(self._device, step.loss_tokens)
        for microbatch in step.microbatches:
            with self._next(rows, microbatch) as pending:
                teacher_rows = WaitTimer(partial(self._received, pending), self._clock, pending.waited_s)
                output = self._student.forward_backward(
                    microbatch,
                    teacher_rows,
                    num_items=step.num_loss_tokens,
                    last=microbatch is step.microbatches[-1],
                    release=partial(self._release, pending, "backward"),
                )
                self._trace.phase("metrics")
                totals.add(output, microbatch, prefill_s=pending.prefill_s, wait=teacher_rows)
        means: Means | None = None
        norm, finite = math.nan, False

        def is_finite(grad_norm: torch.Tensor) -> bool:
            """Alike on every rank: both numbers are those of all of them. The one wait of a step."""
            nonlocal means, norm, finite
            self._trace.phase("metrics")
            means = totals.reduce(loss_scale=1.0 / self._student.num_ranks, stop=self._stop_requested())
            norm = grad_norm.item()
            finite = math.isfinite(means.values["loss"]) and math.isfinite(norm)
            self._trace.phase("optimizer step")
            return finite

        self._trace.phase("optimizer step")
        _, learning_rate = self._student.optimizer_step(step.index, is_finite)
        self._trace.phase("metrics")
        assert means is not None
        if not finite:
            self._skip(step, means.values["loss"], norm)
        metrics = StepMetrics(
            step=step.index + 1,
            epoch=step.epoch,
            **means.values,
            grad_norm=norm,
            learning_rate=learning_rate,
            num_tokens=step.num_tokens,
            num_loss_tokens=step.num_loss_tokens,
            step_s=means.seconds,
            student_tokens_per_s=step.num_tokens / means.seconds,
            teacher_tokens_per_s=means.teacher_tokens_per_s,
            teacher_wait_s=means.wait_s,
            num_skipped=self._num_skipped,
            teachers=means.teachers,
        )
        for observer in self._observers:
            observer.on_step(metrics)
        return means.stop

    def _skip(self, step: Step, loss: float, norm: float) -> None:
        """Counts a step that moved nothing.

        Raises:
            TrainingError: it is one too many; the state before it is saved.
        """
        own = [i for m in step.microbatches for i in m.sample_ids]
        by_rank: list[list[int]] = [[]] * self._student.num_ranks
        dist.all_gather_object(by_rank, own)
        what = (
            f"step {step.index + 1}: loss {loss}, gradient norm {norm}, expected finite numbers; its samples are "
            f"{sorted({i for ids in by_rank for i in ids})}"
        )
        if self._num_skipped >= self._max_skipped_steps:
            if step.index > 0:
                self._save(step.index)
            raise TrainingError(
                f"{what}. {self._num_skipped} steps were skipped before it, as many as training.max_skipped_steps "
                "allows. Lower optimizer.learning_rate, look at these rows, or allow more"
            )
        self._num_skipped += 1
        self._warn(f"{what}. Skipped, {self._num_skipped} of at most {self._max_skipped_steps}")

    def _evaluate(self, evaluation: Evaluation, rows: Iterator[HiddenRows]) -> tuple[float, bool]:
        """Its score, lower is better, and whether to stop."""
        totals = Totals(self._device, evaluation.loss_tokens)
        for microbatch in evaluation.microbatches:
            with self._next(rows, microbatch) as pending:
                received = partial(self._received, pending)
                output = self._student.evaluate(microbatch, received, num_items=evaluation.num_loss_tokens)
                self._release(pending, "metrics")
                totals.add(output, microbatch, prefill_s=pending.prefill_s)
        means = totals.reduce(loss_scale=1.0, stop=self._stop_requested())
        ce_loss = means.values["ce_loss"]
        metrics = EvalMetrics(
            step=evaluation.num_steps_done,
            kl=means.values["kd_loss"],
            ce_loss=ce_loss,
            perplexity=perplexity(ce_loss),
            top1_agreement=means.values["top1_agreement"],
            num_loss_tokens=evaluation.num_loss_tokens,
            eval_s=means.seconds,
            teachers=means.teachers,
        )
        for observer in self._observers:
            observer.on_eval(metrics)
        return metrics.score, means.stop
