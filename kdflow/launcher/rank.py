"""One student rank: in the launcher's own process, or one of several in processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import HashStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kdflow.config import RunConfig, TeacherConfig, named
from kdflow.errors import ConfigError
from kdflow.launcher.prepare import CHECKPOINTS, Prepared, prepare, write_config
from kdflow.modeling import hide_progress_bars, load_lm_head, resolve_device, resolve_dtype
from kdflow.observe import Progress, Recorder, Terminal, WandbRecorder
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
        stores: of tokens, by source, that the launcher prepared.
    """

    config: RunConfig
    folder: str
    num_threads: int
    rings: Rings | None
    stores: dict[str, Path] | None = None


@dataclass(frozen=True)
class Place:
    """Of one rank among several.

    Attributes:
        rank: its number, and that of its GPU.
        port: of the store on this node where they meet.
    """

    rank: int
    num_ranks: int
    port: int


@contextmanager
def process_group(device: torch.device, timeout_s: float, place: Place | None = None) -> Iterator[int]:
    """Joins the other ranks, or makes a group of one; gives the rank."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if place is None:
        rank, num_ranks, store = 0, 1, HashStore()
    else:
        rank, num_ranks = place.rank, place.num_ranks
        store = TCPStore("127.0.0.1", place.port, is_master=False, timeout=timeout)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=num_ranks)
    try:
        yield rank
    finally:
        dist.destroy_process_group()


def run_rank(
    spec: RankSpec,
    prepared: Prepared | None = None,
    *,
    place: Place | None = None,
    stop_requested: Callable[[], bool],
    before_training: Callable[[], None] = lambda: None,
) -> bool:
    """Trains, saves and exports; False where it was asked to stop before the end.

    Args:
        prepared: of the launcher, where the rank lives in its process; prepared here otherwise.
        place: among several; none where it is the only one.
        stop_requested: asked after each step.
        before_training: called once the student is loaded.
    """
    config, folder = spec.config, Path(spec.folder)
    torch.set_num_threads(spec.num_threads)
    hide_progress_bars()
    device = resolve_device(config.student.device, place.rank if place else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if prepared is None:
        prepared = prepare(config, stores=spec.stores)
    torch.manual_seed(config.seed)
    with ExitStack() as stack:
        rank = stack.enter_context(process_group(device, config.transport.timeout_s, place))
        # Of ranks that share their microbatches the first alone asks the teacher.
        data_rank, part = divmod(rank, config.student.context_parallel)
        rings = spec.rings if part == 0 else None
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
        num_steps_done = found.num_steps_done if found else 0
        if num_steps_done > config.training.num_steps:
            raise ConfigError(
                f"resume: the checkpoint is of step {num_steps_done}, and training.num_steps is "
                f"{config.training.num_steps}; give at least as many"
            )
        before_training()
        if rank == 0:  # only now is it known that models, checkpoint and config go together
            write_config(config, folder)
        trace = stack.enter_context(open_trace(config.profile, folder, "student", rank, device, host_is_ahead=True))
        trainer = Trainer(
            student,
            _attach(rings, config, data_rank, device, stack) if rings else NoTeacher(),
            device=device,
            observers=_observers(config, folder, num_steps_done, stack) if rank == 0 else [],
            checkpoints=checkpoints,
            max_skipped_steps=config.training.max_skipped_steps,
            stop_requested=stop_requested,
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
    progress = Progress(
        config.training.num_steps,
        first_step=num_steps_done,
        log_every=config.training.log_every,
        console=Terminal(),
    )
    stack.callback(progress.close)
    recorder = Recorder(folder, first_step=num_steps_done, say=progress.on_warning)
    stack.callback(recorder.close)
    observers: list[Observer] = [recorder, progress]
    observe = config.observe
    if observe.wandb_project is not None:
        name = observe.wandb_name or folder.resolve().name
        board = WandbRecorder(
            folder, project=observe.wandb_project, name=name, options=asdict(config), say=progress.on_warning
        )
        stack.callback(board.close)
        observers.append(board)
    return observers
