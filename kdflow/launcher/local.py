"""A run on one node: teacher processes beside the student's ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from kdflow.config import RunConfig, TeacherConfig, named
from kdflow.errors import TransportError
from kdflow.launcher.prepare import (
    CHECKPOINTS,
    Prepared,
    check_output,
    holds_run,
    locked_output,
    open_output,
    prepare,
)
from kdflow.launcher.rank import RankSpec, Rings, run_rank
from kdflow.launcher.ranks import run_ranks
from kdflow.launcher.stop import StopRequest
from kdflow.launcher.teachers import TeacherProcess, check_teachers, wait_ready
from kdflow.modeling import hide_progress_bars, resolve_device
from kdflow.observe import Terminal
from kdflow.teacher.worker import WorkerSpec
from kdflow.tracing import FOLDER, merged_timeline
from kdflow.transport import RequestRing, choose_hidden_ring, create_hidden_ring, create_turn_ring, request_bytes

_terminal = Terminal()


def run(config: RunConfig, say: Callable[[str], None] = _terminal.say) -> bool:
    """Distils; False where it was stopped before the end (a checkpoint is there then).

    Args:
        say: told of the data, and at the end of where the result is.

    Raises:
        KdflowError: bad input, before any model loads; a process that died, after all others
            were ended.
    """
    hide_progress_bars()
    if config.resume == "auto":
        config = replace(config, resume=holds_run(Path(config.output_dir)))
    check_output(config)
    prepared = prepare(config, say)
    stop = StopRequest()
    with ExitStack() as stack:
        stack.enter_context(locked_output(config))
        folder = open_output(config)
        say(f"train: {prepared.train.report}")
        if prepared.held_out is not None:
            say(f"held out: {prepared.held_out.report}")
        # Entered before them: the processes have ended when it merges what they wrote.
        stack.enter_context(
            merged_timeline(
                config.profile, folder / FOLDER, config.transport.num_slots, config.student.context_parallel
            )
        )
        rings, teachers = None, []
        if prepared.starts_teachers:
            rings, teachers = _start_teachers(prepared, folder, say, stack)

        def begin() -> None:
            """From now on there is something to be saved."""
            wait_ready(teachers, config.transport.start_timeout_s)
            stack.enter_context(stop.installed())

        num_threads = share_threads(config.student.num_threads, config.student.num_ranks)
        spec = RankSpec(config, str(folder), num_threads, rings, prepared.stores)
        try:
            if config.student.num_ranks == 1:  # both sides load at the same time
                finished = run_rank(spec, prepared, stop_requested=stop, before_training=begin)
            else:
                begin()
                finished = run_ranks(spec, stop)
        except TransportError:
            if teachers:
                check_teachers(teachers)
            raise
    say(f"model: {folder / 'model'}" if finished else _how_to_go_on(folder))
    return finished


def _start_teachers(
    prepared: Prepared, folder: Path, say: Callable[[str], None], stack: ExitStack
) -> tuple[Rings, list[TeacherProcess]]:
    """The rings and the teachers' processes, which `stack` ends."""
    config = prepared.config
    num_ranks, transport = config.student.num_data_ranks, config.transport
    workers = list_workers(config)
    choice = choose_hidden_ring(transport, gpu_pairs(config))
    if choice.kind != "host":
        say(f"ring: {choice.kind} slots ({choice.reason})")
    requests = {
        name: stack.enter_context(
            RequestRing.create(
                name=named("requests", name),
                num_slots=num_ranks * transport.num_slots,
                slot_bytes=request_bytes(config.training.tokens_per_microbatch),
            )
        )
        for name in config.named_teachers()
    }
    hidden = [
        stack.enter_context(
            create_hidden_ring(choice, transport, name=f"hidden[{rank}]", slot_bytes=prepared.slot_bytes)
        )
        for rank in range(num_ranks)
    ]
    handles = {name: ring.handle for name, ring in requests.items()}
    turns = None
    if transport.schedule == "colocate":
        turns = stack.enter_context(create_turn_ring(len(workers))).handle
    rings = Rings(handles, [ring.handle for ring in hidden], choice.kind, turns)
    teachers = [
        stack.enter_context(
            TeacherProcess(
                WorkerSpec(
                    teacher=worker.teacher,
                    profile=config.profile,
                    folder=str(folder),
                    index=index,
                    gpu=worker.gpu,
                    num_threads=share_threads(worker.teacher.num_threads, len(workers)),
                    requests=rings.requests[worker.name],
                    hidden=rings.hidden,
                    placement=rings.placement,
                    turns=rings.turns,
                    timeout_s=transport.timeout_s,
                    longest_sample=config.data.max_length,
                    ready_fd=-1,
                ),
                folder / "logs" / f"{worker.label}.log",
                say,
            )
        )
        for index, worker in enumerate(workers)
    ]
    return rings, teachers


@dataclass(frozen=True)
class Worker:
    """One process of a teacher.

    Attributes:
        name: of the teacher.
        number: among this teacher's.
        gpu: its first one, counted round.
    """

    name: str
    teacher: TeacherConfig
    number: int
    gpu: int

    @property
    def label(self) -> str:
        return f"teacher-{self.name}-{self.number}" if self.name else f"teacher-{self.number}"


def list_workers(config: RunConfig) -> list[Worker]:
    """Of all teachers; their GPUs lie behind the student's, as far as there are more."""
    workers, gpu = [], config.student.num_ranks
    for name, teacher in config.named_teachers().items():
        for number in range(teacher.num_workers):
            workers.append(Worker(name, teacher, number, gpu))
            gpu += teacher.tp_size
    return workers


def gpu_pairs(config: RunConfig) -> list[tuple[int | None, int | None]]:
    """GPU of teacher worker and of student rank, None for a CPU, for all that talk to one another."""
    teachers = [resolve_device(worker.teacher.device, worker.gpu).index for worker in list_workers(config)]
    students = [resolve_device(config.student.device, rank).index for rank in range(config.student.num_ranks)]
    return [(teacher, student) for teacher in teachers for student in students]


def share_threads(asked: int, num_processes: int) -> int:
    """CPU threads of each of the teachers' workers, or of each student rank, where none are asked for.

    Each side divides all cores among its own processes: teacher and student take turns at waiting
    for one another, and an idle thread sleeps (see cli.py). On a GPU they serve loading and saving.
    """
    return asked or max(1, len(os.sched_getaffinity(0)) // num_processes)


def _how_to_go_on(folder: Path) -> str:
    return f"stopped; the checkpoint is in {folder / CHECKPOINTS}, --resume=true goes on"
