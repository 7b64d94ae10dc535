"""What ``bench e2e`` runs in the workers: each repetition starts a process and watches it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.cases.e2e_job import Job, Params, load_job, measured_run, python, run_overrides
from bench.model import Trial
from bench.timing import time_step
from kdflow.data import Step

PEERS = "bench.cases.e2e_peers"


def kdflow(params: Params) -> Trial:
    """The user's own command."""
    job = load_job(params)

    def command(folder: str) -> list[str]:
        start = "import sys; from kdflow.cli import main; sys.exit(main())"
        options = run_overrides(params, folder, num_tail_steps=params["num_tail_steps"])
        return python("-c", start, "train", params["config"], "--overwrite=true", "--profile.timeline=true", *options)

    return Trial(lambda: measured_run(params, job, command), note=_dtype_note(job))


def eager(params: Params) -> Trial:
    return _peer("eager", params)


def trl(params: Params) -> Trial:
    """A step as one padded batch, or as a few where the case says so."""
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

    @torch.no_grad()
    def measure() -> dict[str, float]:
        teacher = _Linears(job.config.teacher.model, job.dtype, device)
        student = _Linears(job.config.student.model, job.dtype, device)

        def multiply(steps: Sequence[Step]) -> None:
            for microbatch in (m for step in steps for m in step.microbatches):
                teacher.forward(microbatch.num_tokens, microbatch.num_loss_tokens)
                student.forward(microbatch.num_tokens, microbatch.num_loss_tokens)
                student.backward(microbatch.num_tokens, microbatch.num_loss_tokens)

        multiply(job.steps[:1])
        return time_step(lambda: multiply(job.measured_steps), device=params["device"])

    def step() -> dict[str, float]:
        begin = time.perf_counter()
        measured = measure()
        if device.type == "cuda":  # the other providers need the memory until the next repetition
            torch.cuda.empty_cache()
        return {**measured, "work": float(job.num_tokens), "wall_s": time.perf_counter() - begin}

    return Trial(step, note=_dtype_note(job))


class _Linears:
    """The weights of a model's linear layers, and buffers for their products."""

    def __init__(self, model: str, dtype: torch.dtype, device: torch.device):
        config = AutoConfig.from_pretrained(str(Path(model).expanduser()))
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        head = skeleton.get_output_embeddings()
        shapes = [m.weight.shape for m in skeleton.modules() if isinstance(m, torch.nn.Linear) and m is not head]

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype)

        self._weights = [normal(*shape) for shape in shapes]
        self._head = normal(*head.weight.shape)
        self._make: Callable[[int], torch.Tensor] = normal
        self._buffers: dict[str, torch.Tensor] = {}

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
        numbers = rows * columns
        if name not in self._buffers or self._buffers[name].numel() < numbers:
            self._buffers[name] = self._make(numbers)
        return self._buffers[name][:numbers].view(rows, columns)
