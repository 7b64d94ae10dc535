"""Numbers of a step and of an evaluation, summed over microbatches and ranks."""

from __future__ import annotations

import math
import time
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
        teacher_tokens_per_s: tokens of the step over the time teachers prefilled for it.
        teacher_wait_s: time in which the student waited for hidden states.
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


@dataclass(frozen=True)
class EvalMetrics:
    """One pass over the held-out samples.

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


class Totals:
    """Adds up loss outputs on the device; one device wait, when the sums are read."""

    _MEANS: tuple[str, ...] = ("student_entropy", "teacher_entropy", "top1_agreement")
    _SUMS: tuple[str, ...] = ("loss", "kd_loss", "ce_loss")

    def __init__(self, device: torch.device) -> None:
        self._values = torch.zeros(len(self._SUMS) + len(self._MEANS), device=device)
        self._prefill_s = 0.0
        self._wait_s = 0.0
        self._start = time.perf_counter()

    def add(self, output: KDLossOutput, num_rows: int, *, prefill_s: float, wait_s: float) -> None:
        """A microbatch whose losses are already divided by the tokens of the whole step."""
        fields = output._asdict()
        sums = [fields[n].detach().float() for n in self._SUMS]
        means = [fields[n].float() * num_rows for n in self._MEANS]
        if num_rows == 0:  # means over nothing are undefined
            means = [torch.zeros_like(m) for m in means]
        self._values += torch.stack(sums + means)
        self._prefill_s += prefill_s
        self._wait_s += wait_s

    def reduce(self, num_loss_tokens: int, *, loss_scale: float, stop: bool = False) -> tuple[dict[str, float], bool]:
        """Means over all ranks' tokens, and whether any rank wants to stop.

        Args:
            num_loss_tokens: over all ranks.
            loss_scale: what the losses' sum over ranks is multiplied by.
        """
        times = torch.tensor([self._prefill_s, float(stop)], device=self._values.device)
        values = torch.cat([self._values, times])
        wait_s = torch.tensor([self._wait_s], device=values.device)
        dist.all_reduce(values)
        dist.all_reduce(wait_s, op=dist.ReduceOp.MAX)
        *numbers, prefill_s, stops = values.tolist()
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
