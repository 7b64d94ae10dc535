"""What ``bench student`` runs in the workers: steps of one rank from rows that a real teacher left in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from bench.cases.e2e_job import Job, Params, load_job
from bench.model import Trial
from kdflow.algorithms import ALGORITHMS, ModelInfo
from kdflow.config import OptimizerConfig
from kdflow.data import Step
from kdflow.launcher.rank import process_group
from kdflow.modeling import (
    forward_hidden_states,
    load_causal_lm,
    load_decoder,
    load_lm_head,
    load_model_config,
    load_tokenizer,
    to_device,
)
from kdflow.student import FSDP2Student
from kdflow.tracing import OFF
from kdflow.training import EvalMetrics, StepMetrics, Trainer
from kdflow.types import LMHead, Microbatch
from kdflow_kernels import fused_kd_loss

TIMEOUT_S = 300.0


def _rows(job: Job, device: torch.device) -> dict[int, torch.Tensor]:
    """Teacher rows of each microbatch, by its number."""
    decoder = load_decoder(job.config.teacher.model, job.dtype).to(device)
    found = {}
    with torch.no_grad():
        for number, microbatch in enumerate(m for step in job.measured_steps for m in step.microbatches):
            hidden = _packed_forward(decoder, microbatch, device)
            found[number] = hidden[to_device(microbatch.loss_rows, device).long()].clone()
    return found


def _packed_forward(decoder: Any, microbatch: Microbatch, device: torch.device) -> torch.Tensor:
    return forward_hidden_states(
        decoder,
        to_device(microbatch.input_ids, device).long(),
        to_device(microbatch.position_ids(), device),
        microbatch.sequence_lengths,
    )


def _trial(job: Job, run: Callable[[], float], close: Callable[[], None] | None = None) -> Trial:
    """``run`` trains the steps and returns the loss of the first one."""
    losses: list[float] = []

    def step() -> dict[str, float]:
        losses.append(run())
        return {"work": float(job.num_tokens)}

    note = f"computes in {job.dtype}".replace("torch.", "")
    return Trial(step, check=lambda: {"first_loss": losses[0]}, close=close, note=note)


def kdflow(params: Params) -> Trial:
    """The trainer around the FSDP2 student, as ``kdflow train`` makes them."""
    job, device = load_job(params), torch.device(params["device"])
    config, stack = job.config, ExitStack()
    stack.enter_context(process_group(device, TIMEOUT_S))
    rows = list(_rows(job, device).values())
    infos = [_info(model) for model in (config.student.model, config.teacher.model)]
    algorithm = ALGORITHMS.get(config.algorithm.name)(config.algorithm, student=infos[0], teacher=infos[1])
    student = FSDP2Student(
        config.student,
        config.optimizer,
        algorithms={"": algorithm},
        teacher_heads={"": load_lm_head(config.teacher.model, job.dtype).to(device)},
        device=device,
        num_steps=config.training.num_steps,
    )
    losses = _Losses()
    trainer = Trainer(
        student,
        _Stored(rows),
        device=device,
        observers=[losses],
        checkpoints=_NoCheckpoints(),
        stop_requested=lambda: False,
        trace=OFF,
    )

    def run() -> float:
        losses.found.clear()
        trainer.run(iter(job.measured_steps))
        return losses.found[0]

    return _trial(job, run, stack.close)


def _info(model: str) -> ModelInfo:
    return ModelInfo(model, load_tokenizer(model).get_vocab(), load_model_config(model).get_text_config().vocab_size)


class _Losses:
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_step(self, metrics: StepMetrics) -> None:
        self.found.append(metrics.loss)

    def on_eval(self, metrics: EvalMetrics) -> None:
        pass

    def on_warning(self, text: str) -> None:
        raise AssertionError(text)


class _NoCheckpoints:
    def save(self, num_steps_done: int, *, num_skipped: int, score: float | None) -> None:
        pass

    def is_best(self, score: float) -> bool:
        return False

    def poll(self) -> str | None:
        return None

    def wait(self) -> None:
        pass


class _Stored:
    """Rows in memory in the place of those from a ring."""

    def __init__(self, rows: Sequence[torch.Tensor]) -> None:
        self._all = rows

    def prefetch(self, work: Iterator[Sequence[Microbatch]]) -> Iterator[_StoredRows]:
        for microbatch, rows in zip(chain.from_iterable(work), self._all, strict=True):
            yield _StoredRows(microbatch, rows)


class _StoredRows:
    prefill_s = waited_s = 0.0

    def __init__(self, microbatch: Microbatch, rows: torch.Tensor) -> None:
        self.microbatch = microbatch
        self._rows = rows

    def tensor(self) -> torch.Tensor:
        return self._rows

    def release(self) -> None:
        pass

    def __enter__(self) -> _StoredRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def packed(params: Params) -> Trial:
    """A copy in the compute dtype runs forward and backward; its gradients move fp32 master weights."""
    job, device = load_job(params), torch.device(params["device"])
    loop = _Loop(job, device, load_causal_lm(job.config.student.model, job.dtype), job.dtype)
    return _trial(job, lambda: loop.run(loop.packed_rows))


def padded(params: Params) -> Trial:
    """A microbatch as a batch of samples, each padded to the longest, with transformers' own attention."""
    job, device = load_job(params), torch.device(params["device"])
    model = AutoModelForCausalLM.from_pretrained(str(Path(job.config.student.model).expanduser()), dtype=job.dtype)
    loop = _Loop(job, device, model, job.dtype)
    return _trial(job, lambda: loop.run(loop.padded_rows))


def padded_batches(params: Params, *, every_position: bool = False) -> Trial:
    """The same with whole batches of samples, as one trains without packing, in the place of packed microbatches."""
    job = load_job(params)
    steps = [
        replace(step, microbatches=tuple(Microbatch.pack(batch) for batch in job.batches_of(step)))
        for step in job.steps
    ]
    batches, device = replace(job, steps=tuple(steps)), torch.device(params["device"])
    model = AutoModelForCausalLM.from_pretrained(str(Path(job.config.student.model).expanduser()), dtype=job.dtype)
    loop = _Loop(batches, device, model, job.dtype, every_position=every_position)
    return _trial(batches, lambda: loop.run(loop.padded_rows))


def padded_logits(params: Params) -> Trial:
    """The same with logits of all positions, masked afterwards, as where a model's own logits are used."""
    return padded_batches(params, every_position=True)


def autocast(params: Params) -> Trial:
    """A model in fp32 under autocast: no copies to keep, but its weights are cast in every forward."""
    job, device = load_job(params), torch.device(params["device"])
    loop = _Loop(job, device, load_causal_lm(job.config.student.model, torch.float32), torch.float32)

    def rows(microbatch: Microbatch) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=job.dtype == torch.bfloat16):
            return loop.packed_rows(microbatch)

    return _trial(job, lambda: loop.run(rows))


class _Loop:
    """Forward, fused loss, backward, clipping and AdamW without anything around them.

    With ``every_position`` the loss gets each position of a padded batch, not its loss rows alone.
    """

    def __init__(
        self, job: Job, device: torch.device, model: Any, dtype: torch.dtype, *, every_position: bool = False
    ) -> None:
        self._every_position = every_position
        self._job, self._device = job, device
        self._model = model.to(device).train()
        self._parameters = list(self._model.parameters())
        self._master = self._parameters
        if dtype != torch.float32:
            self._master = [p.detach().float().requires_grad_() for p in self._parameters]
        self._optimizer = _adamw(self._master, job.config.optimizer)
        self._rows = _rows(job, device)
        self._teacher_head: LMHead = load_lm_head(job.config.teacher.model, job.dtype).to(device)
        self._dtype = job.dtype

    def packed_rows(self, microbatch: Microbatch) -> torch.Tensor:
        hidden = _packed_forward(self._model.base_model, microbatch, self._device)
        return hidden[to_device(microbatch.loss_rows, self._device).long()]

    def padded_rows(self, microbatch: Microbatch) -> torch.Tensor:
        lengths = microbatch.sequence_lengths
        longest, starts = max(lengths), np.cumsum((0, *lengths[:-1]))
        ids = np.zeros((len(lengths), longest), np.int64)
        mask = np.zeros_like(ids)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            ids[row, :length], mask[row, :length] = microbatch.input_ids[start : start + length], 1
        output = self._model.base_model(
            input_ids=to_device(ids, self._device), attention_mask=to_device(mask, self._device), use_cache=False
        )
        hidden = output.last_hidden_state.flatten(0, 1)
        return hidden if self._every_position else hidden[self._places(microbatch)]

    def _places(self, microbatch: Microbatch) -> torch.Tensor:
        """Where the loss rows are in a padded batch."""
        longest, starts = max(microbatch.sequence_lengths), np.cumsum((0, *microbatch.sequence_lengths[:-1]))
        sample = np.searchsorted(starts, microbatch.loss_rows, side="right") - 1
        return to_device(sample * longest + microbatch.loss_rows - starts[sample], self._device)

    def _targets(self, number: int, microbatch: Microbatch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Teacher rows, labels and weights, for the positions that the loss gets."""
        rows, labels = self._rows[number], to_device(microbatch.shift_labels(), self._device)
        if not self._every_position:
            return rows, labels, None
        places = self._places(microbatch)
        num_places = len(microbatch.sequence_lengths) * max(microbatch.sequence_lengths)
        # An ignored label would let the loss drop the row; a weight of zero keeps its logits and takes their effect.
        all_labels = torch.zeros(num_places, dtype=labels.dtype, device=self._device)
        all_rows = torch.zeros((num_places, rows.shape[1]), dtype=rows.dtype, device=self._device)
        weights = torch.zeros(num_places, device=self._device)
        all_labels[places], all_rows[places], weights[places] = labels, rows, 1.0
        return all_rows, all_labels, weights

    def run(self, rows: Callable[[Microbatch], torch.Tensor]) -> float:
        first = self._step(self._job.measured_steps[0], rows, 0)
        done = len(self._job.measured_steps[0].microbatches)
        for step in self._job.measured_steps[1:]:
            self._step(step, rows, done)
            done += len(step.microbatches)
        return first.item()

    def _step(self, step: Step, rows: Callable[[Microbatch], torch.Tensor], first: int) -> torch.Tensor:
        head, options = self._model.get_output_embeddings().weight, self._job.config.optimizer
        total = torch.zeros((), device=self._device)
        for number, microbatch in enumerate(step.microbatches, start=first):
            teacher_rows, labels, weights = self._targets(number, microbatch)
            loss = fused_kd_loss(
                rows(microbatch).to(self._dtype),
                head.to(self._dtype),
                teacher_rows,
                self._teacher_head.weight,
                labels,
                row_weight=weights,
                num_items=step.num_loss_tokens,
            ).loss
            loss.backward()
            self._take_gradients()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self._master, options.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self._master is not self._parameters:
            with torch.no_grad():
                for parameter, master in zip(self._parameters, self._master, strict=True):
                    parameter.copy_(master)
        return total

    def _take_gradients(self) -> None:
        if self._master is self._parameters:
            return
        for master, parameter in zip(self._master, self._parameters, strict=True):
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient


def _adamw(parameters: list[torch.Tensor], options: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=options.learning_rate, betas=options.betas, eps=options.eps, weight_decay=0.0, fused=True
    )
