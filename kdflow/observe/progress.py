"""Progress on the terminal: a live bar, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import os
from collections import deque
from contextlib import suppress
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from kdflow.training import EvalMetrics, StepMetrics

RECENT_STEPS = 20


class TimeLeft:
    """Estimates from the mean of recent steps; the first one, which warms up, counts only while alone."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._warming_up = True

    def after(self, metrics: StepMetrics) -> float:
        """Seconds until the last step is done."""
        if len(self._recent) == 1 and self._warming_up:
            self._recent.clear()
            self._warming_up = False
        self._recent.append(metrics.step_s)
        return (self._num_steps - metrics.step) * sum(self._recent) / len(self._recent)


class Terminal(Console):
    """One that may go away, as a pipe's reader does: what is said after that is lost, and the run is not."""

    def say(self, text: str) -> None:
        """A line, as it is."""
        with suppress(OSError):  # it may go to a file, whose disk is full
            self.out(text, highlight=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Progress:
    """Shows loss, tokens per second of both sides and the time left.

    Args:
        num_steps: of the run.
        first_step: finished steps when the run goes on from a checkpoint.
        log_every: steps between plain lines.
        console: where to write; its being a terminal decides the form.
    """

    def __init__(self, num_steps: int, *, first_step: int, log_every: int, console: Terminal) -> None:
        self._console = console
        self._log_every = log_every
        self._num_steps = num_steps
        self._time_left = TimeLeft(num_steps)
        self._bar = Bar(
            TextColumn("[bold]distil"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("student {task.fields[student]} tok/s"),
            TextColumn("teacher {task.fields[teacher]} tok/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "distil", total=num_steps, completed=first_step, loss="-", student="-", teacher="-"
        )
        self._bar.start()

    def on_step(self, metrics: StepMetrics) -> None:
        left_s = self._time_left.after(metrics)
        self._bar.update(
            self._task,
            completed=metrics.step,
            loss=f"{metrics.loss:.3f}",
            student=f"{metrics.student_tokens_per_s:,.0f}",
            teacher=f"{metrics.teacher_tokens_per_s:,.0f}",
        )
        if not self._console.is_terminal and metrics.step % self._log_every == 0:
            self._console.say(
                f"step {metrics.step}/{self._num_steps}  loss {metrics.loss:.4f}{_by_teacher(metrics, 'loss')}  "
                f"grad norm {metrics.grad_norm:.2f}  lr {metrics.learning_rate:.2e}  "
                f"student {metrics.student_tokens_per_s:,.0f} tok/s  "
                + (
                    f"teacher {metrics.teacher_tokens_per_s:,.0f} tok/s  waited {metrics.teacher_wait_s:.2f} s  "
                    if metrics.teacher_tokens_per_s
                    else ""
                )
                + f"{left_s:,.0f} s left"
                + (f"  skipped {metrics.num_skipped}" if metrics.num_skipped else "")
            )

    def on_eval(self, metrics: EvalMetrics) -> None:
        kl, agreement = metrics.kl, metrics.top1_agreement
        self._console.say(
            f"eval after {metrics.step} steps: "
            + ("" if math.isnan(kl) else f"KL(teacher||student) {kl:.4f} nats{_by_teacher(metrics, 'kd_loss')}  ")
            + f"perplexity {metrics.perplexity:,.2f}  "
            + ("" if math.isnan(agreement) else f"top-1 agreement {agreement:.1%}  ")
            + f"({metrics.num_loss_tokens} tokens)"
        )

    def on_warning(self, text: str) -> None:
        self._console.say(f"warning: {text}")

    def close(self) -> None:
        with suppress(OSError):
            self._bar.stop()


def _by_teacher(metrics: StepMetrics | EvalMetrics, number: Literal["loss", "kd_loss"]) -> str:
    """` (code 1.2345, math 0.1234)`, where there are several."""
    parts = [f"{name} {getattr(own, number):.4f}" for name, own in metrics.teachers.items()]
    return f" ({', '.join(parts)})" if parts else ""
