"""Numbers of a step and of an evaluation, summed over microbatches and ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kdflow_kernels import KDLossOutput


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: finished optimizer steps, this one included.
        loss, kd_loss, ce_loss: means over the step's loss tokens, in nats.
        student_entropy, teacher_entropy: means over the same tokens, in nats.
        top1_agreement: part of them where both sides' likeliest token is the same.
        student_tokens_per_s: tokens of the step over the time the step took.
        teacher_tokens_per_s: tokens of the step over the time teachers prefilled for it; 0 without a teacher.
        teacher_wait_s: time in which the student's device stood still for want of hidden states.
        num_skipped: steps so far, this one included, whose loss or gradient was not finite and which moved nothing.
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


@dataclass(frozen=True)
class EvalMetrics:
    """One pass over the held-out samples. What only a teacher can tell is NaN where there is none.

    Attributes:
        step: optimizer steps before it.
        kl: KL(teacher || student) per loss token, in nats.
        ce_loss: cross-entropy of the student with the data's tokens, in nats.
        perplexity: exp(ce_loss).
        top1_agreement: part of the tokens where both sides' likeliest token is the same.
    """

    step: int
    kl: float
    ce_loss: float
    perplexity: float
    top1_agreement: float
    num_loss_tokens: int
    eval_s: float

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


class Totals:
    """Adds up loss outputs on the device; one device wait, when the sums are read."""

    _MEANS: tuple[str, ...] = ("student_entropy", "teacher_entropy", "top1_agreement")
    _SUMS: tuple[str, ...] = ("loss", "kd_loss", "ce_loss")

    def __init__(self, device: torch.device) -> None:
        self._values = torch.zeros(len(self._SUMS) + len(self._MEANS), device=device)
        self._prefill_s = 0.0
        self._waits: list[WaitTimer] = []
        self._start = time.perf_counter()

    def add(self, output: KDLossOutput, num_rows: int, *, prefill_s: float, wait: WaitTimer | None = None) -> None:
        """A microbatch whose losses are already divided by the tokens of the whole step."""
        fields = output._asdict()
        sums = [fields[n].detach().float() for n in self._SUMS]
        means = [fields[n].float() * num_rows for n in self._MEANS]
        if num_rows == 0:  # means over nothing are undefined
            means = [torch.zeros_like(m) for m in means]
        self._values += torch.stack(sums + means)
        self._prefill_s += prefill_s
        if wait is not None:
            self._waits.append(wait)

    def reduce(self, num_loss_tokens: int, *, loss_scale: float, stop: bool = False) -> tuple[dict[str, float], bool]:
        """Means over all ranks' tokens, and whether any rank wants to stop.

        Args:
            num_loss_tokens: over all ranks.
            loss_scale: what the losses' sum over ranks is multiplied by.
        """
        times = torch.tensor([self._prefill_s, float(stop)], device=self._values.device)
        values = torch.cat([self._values, times])
        dist.all_reduce(values)
        *numbers, prefill_s, stops = values.tolist()
        wait_s = torch.tensor([sum(w.seconds() for w in self._waits)], device=values.device)
        dist.all_reduce(wait_s, op=dist.ReduceOp.MAX)
        result: dict[str, float] = dict(zip((*self._SUMS, *self._MEANS), numbers, strict=True))
        for name in self._SUMS:
            result[name] *= loss_scale
        for name in self._MEANS:
            result[name] /= num_loss_tokens
        result["prefill_s"] = prefill_s
        result["wait_s"] = wait_s.item()
        result["seconds"] = time.perf_counter() - self._start
        return result, stops > 0


def perplexity(ce_loss: float) -> float:
    return math.exp(min(ce_loss, 700.0))
