"""One student rank: in the launcher's own process, or one of several under torch elastic."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from rich.console import Console

from kdflow.config import RunConfig, TeacherConfig, named
from kdflow.launcher.prepare import CHECKPOINTS, Prepared, prepare, write_config
from kdflow.modeling import hide_progress_bars, load_lm_head, resolve_device, resolve_dtype
from kdflow.observe import Progress, Recorder, WandbRecorder
from kdflow.student import CheckpointStore, FSDP2Student, export_model, seed_random_state
from kdflow.tracing import open_trace
from kdflow.training import Colocate, NoTeacher, Observer, Overlap, Trainer, plan
from kdflow.transport import HiddenRing, HiddenStatesClient, RequestRing, Turns, attach_hidden_ring
from kdflow.types import LMHead


@dataclass(frozen=True)
class Rings:
    """The way to the teachers.

    Attributes:
        requests: handles of the request rings, by teacher.
        hidden: handles of the data rings, by rank.
        placement: where their slots lie.
        turns: handle of the turn ring, where teachers and students take turns.
    """

    requests: dict[str, str]
    hidden: list[str]
    placement: str
    turns: str | None


@dataclass(frozen=True)
class RankSpec:
    """What a rank is told.

    Attributes:
        folder: of the run.
        num_threads: CPU threads of each rank.
        rings: none where the algorithm uses no teacher.
    """

    config: RunConfig
    folder: str
    num_threads: int
    rings: Rings | None


class StopRequest:
    """Ctrl-C and SIGTERM ask once for a stop after the step; the second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    @contextmanager
    def installed(self) -> Iterator[StopRequest]:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(n, self._on_signal) for n in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[int]:
    """Joins the ranks that torch elastic started, or makes a group of one; gives the rank."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def run_rank(
    spec: RankSpec, prepared: Prepared | None = None, *, before_training: Callable[[], None] = lambda: None
) -> bool:
    """Trains, saves and exports; False where it was asked to stop before the end.

    Args:
        prepared: of the launcher, where the rank lives in its process; prepared here otherwise.
        before_training: called once the student is loaded.
    """
    config, folder = spec.config, Path(spec.folder)
    torch.set_num_threads(spec.num_threads)
    hide_progress_bars()
    device = resolve_device(config.student.device, int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if prepared is None:
        prepared = prepare(config)
    torch.manual_seed(config.seed)
    with ExitStack() as stack:
        rank = stack.enter_context(process_group(device, config.transport.timeout_s))
        # Of ranks that share their microbatches the first alone asks the teacher.
        data_rank, place = divmod(rank, config.student.context_parallel)
        rings = spec.rings if place == 0 else None
        student = _load_student(prepared, device)
        checkpoints = CheckpointStore(
            folder / CHECKPOINTS,
            student,
            data=_fingerprint(prepared),
            keep_last=config.training.keep_last,
            keep_best=config.training.keep_best,
            seed=config.seed,
        )
        stack.callback(checkpoints.close)
        seed_random_state(config.seed, 0, rank)
        found = checkpoints.load() if config.resume else None
        if config.resume and rank == 0:  # only now is it known that checkpoint and config go together
            write_config(config, folder)
        num_steps_done = found.num_steps_done if found else 0
        before_training()
        trace = stack.enter_context(open_trace(config.profile, folder, "student", rank, device, host_is_ahead=True))
        trainer = Trainer(
            student,
            _attach(rings, config, data_rank, device, stack) if rings else NoTeacher(),
            device=device,
            observers=_observers(config, folder, num_steps_done, stack) if rank == 0 else [],
            checkpoints=checkpoints,
            max_skipped_steps=config.training.max_skipped_steps,
            stop_requested=stack.enter_context(StopRequest().installed()),
            trace=trace,
        )
        finished = trainer.run(
            plan(
                config,
                prepared.train,
                prepared.held_out,
                rank=data_rank,
                num_ranks=config.student.num_data_ranks,
                start=num_steps_done,
            ),
            num_skipped=found.num_skipped if found else 0,
        )
        if finished:
            export_model(student, prepared.tokenizer, folder / "model")
        return finished


def _load_student(prepared: Prepared, device: torch.device) -> FSDP2Student:
    config = prepared.config

    def head(teacher: TeacherConfig) -> LMHead | None:
        if not prepared.uses_teacher:
            return LMHead(torch.empty(0, 0))
        if teacher.is_base:
            return None
        dtype = resolve_dtype(teacher.dtype, resolve_device(teacher.device))
        return load_lm_head(teacher.model, dtype)

    return FSDP2Student(
        config.student,
        config.optimizer,
        algorithms=prepared.algorithms,
        teacher_heads={name: head(teacher) for name, teacher in config.named_teachers().items()},
        device=device,
        num_steps=config.training.num_steps,
    )


def _fingerprint(prepared: Prepared) -> dict[str, str]:
    """Of what the student learns from: data and teachers."""
    found = {f"data {source}": digest[:16] for source, digest in prepared.train.digests.items()}
    if prepared.uses_teacher:
        teachers = prepared.config.named_teachers()
        found |= {named("teacher", name): teacher.model for name, teacher in teachers.items()}
    return found


def _attach(rings: Rings, config: RunConfig, rank: int, device: torch.device, stack: ExitStack) -> Overlap | Colocate:
    # Left in the opposite order: teachers go when there is nobody to ask any more, and slots on a
    # GPU are freed when they have gone.
    hidden = attach_hidden_ring(rings.hidden[rank], placement=rings.placement, role="consumer", device=device)
    stack.enter_context(hidden)
    requests = {
        name: stack.enter_context(RequestRing.attach(handle, role="producer"))
        for name, handle in rings.requests.items()
    }
    teachers, timeout_s = config.named_teachers(), config.transport.timeout_s
    client = HiddenStatesClient(
        requests,
        hidden,
        rank=rank,
        timeout_s=timeout_s,
        max_resends=max(teacher.max_restarts for teacher in teachers.values()),
    )
    if rings.turns is None:
        return Overlap(client)
    turns = None
    if rank == 0:
        ring = stack.enter_context(HiddenRing.attach(rings.turns, role="consumer"))
        workers = [requests[name] for name, teacher in teachers.items() for _ in range(teacher.num_workers)]
        turns = Turns(workers, ring, timeout_s=timeout_s)
    return Colocate(client, turns, device=device)


def _observers(config: RunConfig, folder: Path, num_steps_done: int, stack: ExitStack) -> list[Observer]:
    recorder = Recorder(folder, first_step=num_steps_done)
    progress = Progress(
        config.training.num_steps,
        first_step=num_steps_done,
        log_every=config.training.log_every,
        console=Console(),
    )
    stack.callback(recorder.close)
    stack.callback(progress.close)
    observers: list[Observer] = [recorder, progress]
    observe = config.observe
    if observe.wandb_project is not None:
        name = observe.wandb_name or folder.resolve().name
        board = WandbRecorder(folder, project=observe.wandb_project, name=name, options=asdict(config))
        stack.callback(board.close)
        observers.append(board)
    return observers
