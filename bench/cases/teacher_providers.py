"""What ``bench teacher`` runs in the workers."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.cases.e2e_job import Job, Params, load_job
from bench.model import Trial
from kdflow.config import ProfileConfig, TeacherConfig, TransportConfig
from kdflow.launcher.teachers import TeacherProcess
from kdflow.modeling import (
    forward_hidden_states,
    load_decoder,
    load_model_config,
    resolve_device,
    resolve_dtype,
    to_device,
)
from kdflow.modeling.attention import packed_options
from kdflow.teacher.worker import WorkerSpec
from kdflow.transport import (
    HiddenStatesClient,
    RequestRing,
    attach_hidden_ring,
    choose_hidden_ring,
    create_hidden_ring,
    request_bytes,
)
from kdflow.types import Microbatch

NUM_SLOTS = 4
TIMEOUT_S = 300.0


def _microbatches(job: Job) -> list[Microbatch]:
    return [microbatch for step in job.measured_steps for microbatch in step.microbatches]


def _trial(job: Job, run: Callable[[Iterable[Microbatch]], float], close: Callable[[], None] | None = None) -> Trial:
    """``run`` prefills the microbatches and returns a number that stands for the rows it handed over."""
    microbatches, found = _microbatches(job), {}

    def step() -> dict[str, float]:
        found["mean_row"] = run(microbatches)
        return {"work": float(job.num_tokens)}

    return Trial(step, check=lambda: found, close=close, note=f"computes in {job.dtype}".replace("torch.", ""))


def decoder(params: Params) -> Trial:
    job, device = load_job(params), torch.device(params["device"])
    model = load_decoder(job.config.teacher.model, job.dtype).to(device)

    @torch.inference_mode()
    def run(microbatches: Iterable[Microbatch]) -> float:
        total = torch.zeros((), dtype=torch.float64, device=device)
        for microbatch in microbatches:
            hidden = forward_hidden_states(
                model,
                to_device(microbatch.input_ids, device).long(),
                to_device(microbatch.position_ids(), device),
                microbatch.sequence_lengths,
            )
            total += hidden[int(microbatch.loss_rows[0])].double().mean()  # one row each, so that runs can be compared
        return total.item()

    return _trial(job, run)


def hf(params: Params) -> Trial:
    return _served(params, "hf")


def sglang(params: Params) -> Trial:
    __import__("sglang")
    return _served(params, "sglang")


def _served(params: Params, backend: str) -> Trial:
    job = load_job(params)
    run, close = start_teacher(
        replace(job.config.teacher, backend=backend),
        device=params["device"],
        tokens_per_microbatch=job.config.training.tokens_per_microbatch,
    )
    return _trial(job, run, close)


def start_teacher(
    config: TeacherConfig, *, device: str, tokens_per_microbatch: int
) -> tuple[Callable[[Iterable[Microbatch]], float], Callable[[], None]]:
    """A teacher's own process, asked through the rings as a student asks.

    Returns:
        What asks for microbatches, takes their rows and adds up the mean of one row of each; and what ends all.
    """
    index = int(device.partition(":")[2] or 0)
    config = replace(config, num_threads=torch.get_num_threads())
    teacher_device = resolve_device(config.device, index)
    item_bytes = resolve_dtype(config.dtype, teacher_device).itemsize
    transport = TransportConfig(num_slots=NUM_SLOTS)
    choice = choose_hidden_ring(transport, [(teacher_device.index, teacher_device.index)])
    hidden_size = load_model_config(config.model).get_text_config().hidden_size
    stack = ExitStack()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    requests = stack.enter_context(
        RequestRing.create(name="requests", num_slots=NUM_SLOTS, slot_bytes=request_bytes(tokens_per_microbatch))
    )
    slot_bytes = tokens_per_microbatch * hidden_size * item_bytes
    ring = stack.enter_context(create_hidden_ring(choice, transport, name="hidden", slot_bytes=slot_bytes))
    spec = WorkerSpec(
        teacher=config,
        profile=ProfileConfig(),
        folder=str(folder),
        index=0,
        gpu=index,
        num_threads=config.num_threads,
        requests=requests.handle,
        hidden=[ring.handle],
        placement=choice.kind,
        turns=None,
        timeout_s=TIMEOUT_S,
        longest_sample=tokens_per_microbatch,
        ready_fd=-1,
    )
    teacher = stack.enter_context(TeacherProcess(spec, folder / "teacher.log", lambda text: None))
    teacher.wait_ready(TIMEOUT_S)
    hidden = stack.enter_context(
        attach_hidden_ring(ring.handle, placement=choice.kind, role="consumer", device=teacher_device)
    )
    sender = stack.enter_context(RequestRing.attach(requests.handle, role="producer"))
    client = HiddenStatesClient({"": sender}, hidden, rank=0, timeout_s=TIMEOUT_S)

    def run(microbatches: Iterable[Microbatch]) -> float:
        total = 0.0
        for pending in client.prefetch(microbatches):
            with pending:
                total += pending.tensor()[0].double().mean().item()
        return total

    return run, stack.close


def all_layers_through_queue(params: Params) -> Trial:
    """What one writes first: transformers' own ``output_hidden_states``, the last of them as numpy through a queue."""
    job, device = load_job(params), torch.device(params["device"])
    context = multiprocessing.get_context("spawn")
    asked, answered = context.Queue(), context.Queue()
    arguments = (job.config.teacher.model, str(job.dtype).removeprefix("torch."), str(device), torch.get_num_threads())
    process = context.Process(target=_answer, args=(asked, answered, *arguments), daemon=True)
    process.start()

    def run(microbatches: Iterable[Microbatch]) -> float:
        sent = 0
        for microbatch in microbatches:
            asked.put(pickle.dumps(microbatch))
            sent += 1
        total = 0.0
        for _ in range(sent):
            rows = torch.from_numpy(answered.get(timeout=TIMEOUT_S))
            total += rows[0].double().mean().item()
        return total

    def close() -> None:
        process.terminate()
        process.join(10)

    return _trial(job, run, close)


@torch.inference_mode()
def _answer(asked, answered, model: str, dtype: str, device_name: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    device = torch.device(device_name)
    decoder = load_decoder(model, getattr(torch, dtype)).to(device)
    while True:
        microbatch: Microbatch = pickle.loads(asked.get())
        ids = to_device(microbatch.input_ids.astype(np.int64), device)
        output = decoder(
            input_ids=ids[None],
            position_ids=to_device(microbatch.position_ids(), device)[None],
            use_cache=False,
            output_hidden_states=True,
            **packed_options(microbatch.sequence_lengths, device),
        )
        rows = output.hidden_states[-1][0, to_device(microbatch.loss_rows, device).long()]
        answered.put(rows.float().cpu().numpy())
