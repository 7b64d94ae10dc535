"""A run on one node: teacher processes beside the student's ranks."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from kdflow.config import RunConfig
from kdflow.errors import TransportError
from kdflow.launcher.prepare import Prepared, open_output, prepare
from kdflow.launcher.rank import RankSpec, Rings, run_rank
from kdflow.launcher.teachers import TeacherProcess, check_teachers
from kdflow.modeling import hide_progress_bars, resolve_device
from kdflow.teacher.worker import WorkerSpec
from kdflow.tracing import FOLDER, merged_timeline
from kdflow.transport import RequestRing, choose_hidden_ring, create_hidden_ring, create_turn_ring, request_bytes


def run(config: RunConfig, say: Callable[[str], None] = print) -> bool:
    """Distils; False where it was stopped before the end (a checkpoint is there then).

    Args:
        say: told of the data, and at the end of where the result is.

    Raises:
        KdflowError: bad input, before any model loads; a process that died, after all others
            were ended.
    """
    hide_progress_bars()
    prepared = prepare(config)
    folder = open_output(config)
    say(f"train: {prepared.train.report}")
    if prepared.held_out is not None:
        say(f"held out: {prepared.held_out.report}")
    teacher_threads, student_threads = share_threads(config)
    with ExitStack() as stack:
        # Entered first: the processes have ended when it merges what they wrote.
        stack.enter_context(merged_timeline(config.profile, folder / FOLDER, config.transport.num_slots))
        rings, teachers = None, []
        if prepared.algorithm.uses_teacher:
            rings, teachers = _start_teachers(prepared, folder, teacher_threads, say, stack)

        def wait_for_teachers() -> None:
            for teacher in teachers:
                teacher.wait_ready(config.transport.start_timeout_s)

        spec = RankSpec(config, str(folder), student_threads, rings)
        try:
            if config.student.num_ranks == 1:  # both sides load at the same time
                finished = run_rank(spec, prepared, before_training=wait_for_teachers)
            else:
                wait_for_teachers()
                finished = _run_ranks(spec)
        except TransportError:
            if teachers:
                check_teachers(teachers)
            raise
    say(f"model: {folder / 'model'}" if finished else _how_to_go_on(folder))
    return finished


def _start_teachers(
    prepared: Prepared, folder: Path, num_threads: int, say: Callable[[str], None], stack: ExitStack
) -> tuple[Rings, list[TeacherProcess]]:
    """The rings and the teachers' processes, which `stack` ends."""
    config = prepared.config
    num_ranks, transport = config.student.num_ranks, config.transport
    choice = choose_hidden_ring(transport, gpu_pairs(config))
    if choice.kind != "host":
        say(f"ring: {choice.kind} slots ({choice.reason})")
    requests = stack.enter_context(
        RequestRing.create(
            name="requests",
            num_slots=num_ranks * transport.num_slots,
            slot_bytes=request_bytes(config.training.tokens_per_microbatch),
        )
    )
    hidden = [
        stack.enter_context(
            create_hidden_ring(choice, transport, name=f"hidden[{rank}]", slot_bytes=prepared.slot_bytes)
        )
        for rank in range(num_ranks)
    ]
    turns = None
    if transport.schedule == "colocate":
        turns = stack.enter_context(create_turn_ring(config.teacher.num_workers)).handle
    rings = Rings(requests.handle, [ring.handle for ring in hidden], choice.kind, turns)
    teachers = [
        stack.enter_context(
            TeacherProcess(
                WorkerSpec(
                    teacher=config.teacher,
                    profile=config.profile,
                    folder=str(folder),
                    index=worker,
                    gpu=teacher_gpu(config, worker),
                    num_threads=num_threads,
                    requests=rings.requests,
                    hidden=rings.hidden,
                    placement=rings.placement,
                    turns=rings.turns,
                    timeout_s=transport.timeout_s,
                    ready_fd=-1,
                ),
                folder / "logs" / f"teacher-{worker}.log",
                say,
            )
        )
        for worker in range(config.teacher.num_workers)
    ]
    return rings, teachers


def _run_ranks(spec: RankSpec) -> bool:
    """The ranks as processes of their own, under torch elastic."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=spec.config.student.num_ranks,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="spawn",
    )
    os.environ["OMP_NUM_THREADS"] = str(spec.num_threads)
    try:
        return all(elastic_launch(launch, run_rank)(spec).values())
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise TransportError(f"student rank {rank} failed: {failure.message}") from error


def teacher_gpu(config: RunConfig, worker: int) -> int:
    """The first one of a worker: behind the student's GPUs, as far as there are more."""
    return config.student.num_ranks + worker * config.teacher.tp_size


def gpu_pairs(config: RunConfig) -> list[tuple[int | None, int | None]]:
    """GPU of teacher worker and of student rank, None for a CPU, for all that talk to one another."""
    teachers = [
        resolve_device(config.teacher.device, teacher_gpu(config, worker)).index
        for worker in range(config.teacher.num_workers)
    ]
    students = [resolve_device(config.student.device, rank).index for rank in range(config.student.num_ranks)]
    return [(teacher, student) for teacher in teachers for student in students]


def share_threads(config: RunConfig) -> tuple[int, int]:
    """CPU threads of each teacher worker and of each student rank.

    Each side divides all cores among its own processes: teacher and student take turns at waiting
    for one another, and an idle thread sleeps (see cli.py). On a GPU they serve loading and saving.
    """
    cores = len(os.sched_getaffinity(0))

    def share(asked: int, num_processes: int) -> int:
        return asked or max(1, cores // num_processes)

    teacher, student = config.teacher, config.student
    return (
        share(teacher.num_threads, teacher.num_workers),
        share(student.num_threads, student.num_ranks),
    )


def _how_to_go_on(folder: Path) -> str:
    return f"stopped; the checkpoint is in {folder / 'checkpoints'}, --resume=true goes on"
