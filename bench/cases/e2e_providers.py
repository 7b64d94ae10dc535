"""What ``bench e2e`` runs in the workers: each repetition starts a process and watches it."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.cases.e2e_job import Job, Params, load_job, measured_run, python, run_overrides
from bench.model import Trial

PEERS = "bench.cases.e2e_peers"


def kdflow(params: Params) -> Trial:
    """The user's own command."""
    job = load_job(params)

    def command(folder: str) -> list[str]:
        start = "import sys; from kdflow.cli import main; sys.exit(main())"
        options = run_overrides(params, folder, num_tail_steps=params["num_tail_steps"])
        return python("-c", start, "train", params["config"], "--overwrite=true", *options)

    return Trial(lambda: measured_run(params, job, command), note=_dtype_note(job))


def eager(params: Params) -> Trial:
    return _peer("eager", params)


def trl(params: Params) -> Trial:
    """A whole step as one padded batch."""
    __import__("trl.experimental.gkd")
    return _peer("trl", params)


def trl_one_by_one(params: Params) -> Trial:
    """A step as batches of one sample, accumulated: no padding, least memory."""
    __import__("trl.experimental.gkd")
    return _peer("trl_one_by_one", params)


def _peer(name: str, params: Params) -> Trial:
    job = load_job(params)

    def command(folder: str) -> list[str]:
        return python("-m", PEERS, name, json.dumps(dict(params)), folder)

    return Trial(lambda: measured_run(params, job, command), note=_dtype_note(job))


def _dtype_note(job: Job) -> str:
    return f"computes in {job.dtype}".replace("torch.", "")


@torch.no_grad()
def gemms(params: Params) -> Trial:
    """Every linear layer of the measured steps as a bare matrix product.

    Teacher: forward over all tokens, its head over the loss rows. Student: forward and the two
    products of backward over the same. Attention, norms, the loss and the optimizer are free.
    """
    job = load_job(params)
    device = torch.device(params["device"])
    teacher = _Linears(job.config.teacher.model, job.dtype, device)
    student = _Linears(job.config.student.model, job.dtype, device)

    @torch.no_grad()
    def step() -> dict[str, float]:
        for training_step in job.measured_steps:
            for microbatch in training_step.microbatches:
                teacher.forward(microbatch.num_tokens, microbatch.num_loss_tokens)
                student.forward(microbatch.num_tokens, microbatch.num_loss_tokens)
                student.backward(microbatch.num_tokens, microbatch.num_loss_tokens)
        return {"work": float(job.num_tokens)}

    step()
    return Trial(step, note=_dtype_note(job))


class _Linears:
    """The weights of a model's linear layers, and buffers for their products."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device):
        from pathlib import Path

        config = AutoConfig.from_pretrained(str(Path(model).expanduser()))
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        head = skeleton.get_output_embeddings()
        shapes = [m.weight.shape for m in skeleton.modules() if isinstance(m, torch.nn.Linear) and m is not head]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(dtype)

        self._weights = [normal(*shape) for shape in shapes]
        self._head = normal(*head.weight.shape)
        self._make: Callable[..., torch.Tensor] = normal
        self._buffers: dict[tuple[str, int, int], torch.Tensor] = {}

    def forward(self, tokens: int, rows: int) -> None:
        for weight, count in self._products(tokens, rows):
            outputs, inputs = weight.shape
            torch.mm(self._buffer("x", count, inputs), weight.T, out=self._buffer("y", count, outputs))

    def backward(self, tokens: int, rows: int) -> None:
        for weight, count in self._products(tokens, rows):
            outputs, inputs = weight.shape
            gradient = self._buffer("y", count, outputs)
            torch.mm(gradient, weight, out=self._buffer("dx", count, inputs))
            torch.mm(gradient.T, self._buffer("x", count, inputs), out=self._buffer("dw", outputs, inputs))

    def _products(self, tokens: int, rows: int) -> list[tuple[torch.Tensor, int]]:
        return [*((weight, tokens) for weight in self._weights), (self._head, rows)]

    def _buffer(self, name: str, rows: int, columns: int) -> torch.Tensor:
        key = (name, rows, columns)
        if key not in self._buffers:
            self._buffers[key] = self._make(rows, columns)
        return self._buffers[key]
