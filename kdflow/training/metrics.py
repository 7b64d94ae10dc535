"""Numbers of a step and of an evaluation, summed over microbatches and ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from kdflow.types import Microbatch
from kdflow_kernels import KDLossOutput


@dataclass(frozen=True)
class TeacherMetrics:
    """What a step or an evaluation found with one of several teachers: means over the loss tokens that learn from it.

    Attributes:
        loss: as it is trained; of an evaluation, KL plus cross-entropy.
        kd_loss: of an evaluation, KL(teacher || student).
    """

    loss: float
    kd_loss: float
    ce_loss: float
    student_entropy: float
    teacher_entropy: float
    top1_agreement: float
    num_loss_tokens: int


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: finished optimizer steps, this one included.
        loss, kd_loss, ce_loss: means over the step's loss tokens, in nats.
        student_entropy, teacher_entropy: means over the same tokens, in nats.
        top1_agreement: part of them where both sides' likeliest token is the same.
        student_tokens_per_s: tokens of the step over the time the step took.
        teacher_tokens_per_s: tokens that teachers read for the step, with their own context where they have one, over
            the time that they prefilled for it, summed up over their processes; 0 without a teacher process.
        teacher_wait_s: time in which the student's device stood still for want of hidden states.
        num_skipped: steps so far, this one included, whose loss or gradient was not finite and which moved nothing.
        teachers: of those teachers that the step had tokens for, by name; empty where there is one without a name.
    """

    step: int
    epoch: int
    loss: float
    kd_loss: float
    ce_loss: float
    student_entropy: float
    teacher_entropy: float
    top1_agreement: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_loss_tokens: int
    step_s: float
    student_tokens_per_s: float
    teacher_tokens_per_s: float
    teacher_wait_s: float
    num_skipped: int
    teachers: Mapping[str, TeacherMetrics] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalMetrics:
    """One pass over the held-out samples. What only a teacher can tell is NaN where there is none.

    Attributes:
        step: optimizer steps before it.
        kl: KL(teacher || student) per loss token, in nats.
        ce_loss: cross-entropy of the student with the data's tokens, in nats.
        perplexity: exp(ce_loss).
        top1_agreement: part of the tokens where both sides' likeliest token is the same.
        teachers: as in StepMetrics.
    """

    step: int
    kl: float
    ce_loss: float
    perplexity: float
    top1_agreement: float
    num_loss_tokens: int
    eval_s: float
    teachers: Mapping[str, TeacherMetrics] = field(default_factory=dict)

    @property
    def score(self) -> float:
        """What the best checkpoint goes by, lower is better: kl, or ce_loss where there is no teacher."""
        return self.ce_loss if math.isnan(self.kl) else self.kl


class WaitTimer:
    """Calls for teacher rows, and says how long the student's device stood still until they came.

    On CUDA the host is ahead of the device: what counts is the time from the end of the work that
    was queued before the call to the moment when the rows are there.

    Args:
        clock: a stream in which nothing else runs, on CUDA; the device computes in the current one.
        waited_s: how long it stood still before.
    """

    def __init__(self, function: Callable[[], torch.Tensor], clock: torch.cuda.Stream | None, waited_s: float) -> None:
        self._function = function
        self._clock = clock
        self._waited_s = waited_s
        self._compute = None if clock is None else torch.cuda.current_stream(clock.device)
        self._host_s = 0.0
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def __call__(self) -> torch.Tensor:
        if self._clock is None or self._compute is None:
            start = time.perf_counter()
            rows = self._function()
            self._host_s = time.perf_counter() - start
            return rows
        self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        self._events[0].record(self._compute)
        rows = self._function()
        self._events[1].record(self._clock)
        return rows

    def seconds(self) -> float:
        """To be asked once the device is done with what came after the rows."""
        if self._events is None:
            return self._waited_s + self._host_s
        queued, came = self._events
        came.synchronize()
        return self._waited_s + max(0.0, queued.elapsed_time(came) * 1e-3)


@dataclass(frozen=True)
class Means:
    """Over the loss tokens of all ranks.

    Attributes:
        values: by name, over all tokens.
        teachers: the same by teacher, of those that have a name.
        teacher_tokens_per_s: as in StepMetrics.
        wait_s: how long the rank that waited most stood still.
        seconds: since the totals were begun.
        stop: whether any rank wants to stop.
    """

    values: Mapping[str, float]
    teachers: Mapping[str, TeacherMetrics]
    teacher_tokens_per_s: float
    wait_s: float
    seconds: float
    stop: bool


class Totals:
    """Adds up loss outputs on the device; one device wait, when the sums are read.

    Args:
        loss_tokens: of the whole step, over all ranks and microbatches, by the teacher that they learn from; the same
            on every rank.
    """

    _SUMS: tuple[str, ...] = ("loss", "kd_loss", "ce_loss")
    _MEANS: tuple[str, ...] = ("student_entropy", "teacher_entropy", "top1_agreement")

    def __init__(self, device: torch.device, loss_tokens: Mapping[str, int]) -> None:
        self._loss_tokens = loss_tokens
        self._row = {name: index for index, name in enumerate(loss_tokens)}
        self._values = torch.zeros(len(loss_tokens), len(self._SUMS) + len(self._MEANS), device=device)
        self._prefill_s, self._num_prefilled = 0.0, 0
        self._waits: list[WaitTimer] = []
        self._start = time.perf_counter()

    def add(
        self, output: KDLossOutput, microbatch: Microbatch, *, prefill_s: float, wait: WaitTimer | None = None
    ) -> None:
        """A microbatch whose losses are already divided by the tokens of the whole step."""
        fields = output._asdict()
        sums = [fields[n].detach().float() for n in self._SUMS]
        num_rows = output.num_tokens
        # Means over nothing are undefined.
        means = [torch.where(num_rows > 0, fields[n].float() * num_rows, 0.0) for n in self._MEANS]
        self._values[self._row[microbatch.teacher_name]] += torch.stack(sums + means)
        self._prefill_s += prefill_s
        if microbatch.num_loss_tokens:  # others no teacher reads
            self._num_prefilled += microbatch.for_teacher().num_tokens
        if wait is not None:
            self._waits.append(wait)

    def reduce(self, *, loss_scale: float, stop: bool = False) -> Means:
        """Of all ranks.

        Args:
            loss_scale: what the losses' sum over ranks is multiplied by.
            stop: whether this rank wants to.
        """
        times = torch.tensor([self._prefill_s, self._num_prefilled, float(stop)], device=self._values.device)
        values = torch.cat([self._values.flatten(), times])
        dist.all_reduce(values)
        *numbers, prefill_s, num_prefilled, stops = values.tolist()
        wait_s = torch.tensor([sum(w.seconds() for w in self._waits)], device=values.device)
        dist.all_reduce(wait_s, op=dist.ReduceOp.MAX)
        width = len(self._SUMS) + len(self._MEANS)
        rows = [numbers[start : start + width] for start in range(0, len(numbers), width)]
        num_all = sum(self._loss_tokens.values())

        def means(row: Sequence[float], num_tokens: int) -> dict[str, float]:
            sums, totals = row[: len(self._SUMS)], row[len(self._SUMS) :]
            found = dict(zip(self._SUMS, (value * loss_scale * (num_all / num_tokens) for value in sums), strict=True))
            return found | dict(zip(self._MEANS, (value / num_tokens for value in totals), strict=True))

        parts = zip(self._loss_tokens.items(), rows, strict=True)
        teachers = {name: TeacherMetrics(**means(row, n), num_loss_tokens=n) for (name, n), row in parts if name and n}
        return Means(
            values=means([sum(column) for column in zip(*rows, strict=True)], num_all),
            teachers=teachers,
            teacher_tokens_per_s=num_prefilled / prefill_s if prefill_s else 0.0,
            wait_s=wait_s.item(),
            seconds=time.perf_counter() - self._start,
            stop=stops > 0,
        )


def perplexity(ce_loss: float) -> float:
    return math.exp(min(ce_loss, 700.0))
