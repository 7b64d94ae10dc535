"""A teacher process: `python -m kdflow.teacher.worker SPEC`, started by the launcher.

SPEC is JSON (see WorkerSpec). The worker loads its teacher, checks it (preflight.py), announces
itself with one line of JSON on the descriptor `ready_fd`, then answers requests until the students
have left, it is terminated or its parent is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kdflow.config import ProfileConfig, TeacherConfig
from kdflow.errors import EngineDied, KdflowError
from kdflow.modeling import hide_progress_bars
from kdflow.teacher.base import TEACHERS, Teacher, TeacherRings
from kdflow.teacher.preflight import Preflight
from kdflow.tracing import Trace, open_trace, share_trace
from kdflow.transport import HiddenRing, SleepOrder

# Exit code of a worker whose engine died under it, so that starting it again may help.
ENGINE_DIED = 75
_TICK_S = 0.5


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is told.

    Attributes:
        teacher, profile: the sections of the run's config.
        folder: of the run.
        index: of this worker.
        gpu: which one to take, counted round.
        num_threads: CPU threads.
        requests: handle of the request ring.
        hidden: handles of the data rings, by rank.
        placement: where their slots lie.
        turns: handle of the turn ring, where teachers and students take turns.
        timeout_s: longest wait for a slot, seconds.
        longest_sample: most tokens of a sample that will be asked for.
        ready_fd: descriptor, inherited, for the announcement.
    """

    teacher: TeacherConfig
    profile: ProfileConfig
    folder: str
    index: int
    gpu: int
    num_threads: int
    requests: str
    hidden: list[str]
    placement: str
    turns: str | None
    timeout_s: float
    longest_sample: int
    ready_fd: int

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> WorkerSpec:
        values = json.loads(text)
        sections = {"teacher": TeacherConfig(**values["teacher"]), "profile": ProfileConfig(**values["profile"])}
        return WorkerSpec(**{**values, **sections})


class _Worker:
    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec
        self._turns: HiddenRing | None = None
        torch.set_num_threads(spec.num_threads)
        share_trace(spec.profile, Path(spec.folder), "teacher", spec.index)  # with the processes of its engine
        self._teacher: Teacher = TEACHERS.get(spec.teacher.backend)(
            spec.teacher, gpu=spec.gpu, sleeps=spec.turns is not None
        )

    def run(self) -> None:
        """Checks the teacher, announces it, and serves until the students have left."""
        spec, teacher = self._spec, self._teacher
        try:
            preflight = Preflight(spec.teacher, teacher)
            teacher.attach(
                TeacherRings(spec.requests, tuple(spec.hidden), spec.placement, spec.timeout_s, spec.longest_sample)
            )
            ready = {"hidden_size": teacher.hidden_size, "dtype": str(teacher.dtype)}
            with os.fdopen(spec.ready_fd, "w") as announcement:
                announcement.write(json.dumps(ready) + "\n")
            if spec.turns is not None:
                self._turns = HiddenRing.attach(spec.turns, role="producer")
            folder, device = Path(spec.folder), teacher.device
            with open_trace(spec.profile, folder, "teacher", spec.index, device, host_is_ahead=False) as trace:
                limit = spec.teacher.check_every or None
                while pause := teacher.serve(limit=limit, trace=trace):
                    if isinstance(pause, SleepOrder) and not self._sleep(pause, trace):
                        break
                    preflight.check_again()
        finally:
            teacher.close()

    def _sleep(self, order: SleepOrder, trace: Trace) -> bool:
        """Until it is woken; False when the students have left."""
        assert self._turns is not None
        trace.phase("sleep")
        self._teacher.sleep()
        trace.phase("asleep")
        woken = order.fulfil(self._turns, timeout_s=self._spec.timeout_s)
        if woken:
            trace.phase("wake up")
            self._teacher.wake_up()
        trace.phase()
        return woken


def _end_with_parent() -> None:
    """As by SIGTERM, whatever it is at: an engine may start for minutes, and ranks may ask without a break."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_TICK_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's, which ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _end_with_parent()
    hide_progress_bars()
    try:
        _Worker(WorkerSpec.from_json(sys.argv[1])).run()
    except KdflowError as error:
        print(f"teacher: error: {error}", file=sys.stderr, flush=True)
        sys.exit(ENGINE_DIED if isinstance(error, EngineDied) else 1)


if __name__ == "__main__":
    main()
