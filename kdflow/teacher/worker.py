"""A teacher process: `python -m kdflow.teacher.worker SPEC`, started by the launcher.

SPEC is JSON (see WorkerSpec). The worker loads its teacher, announces itself with one line of
JSON on the descriptor `ready_fd`, then answers requests until it is terminated or its parent
is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from kdflow.config import ProfileConfig, TeacherConfig
from kdflow.modeling import hide_progress_bars
from kdflow.teacher.base import TEACHERS, Teacher
from kdflow.tracing import open_trace
from kdflow.transport import HiddenStatesServer, RequestRing, attach_hidden_ring
from kdflow.types import Microbatch


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
        timeout_s: longest wait for a slot, seconds.
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
    timeout_s: float
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
        self._parent = os.getppid()
        self._rings = ExitStack()
        torch.set_num_threads(spec.num_threads)
        self._teacher: Teacher = TEACHERS.get(spec.teacher.backend)(spec.teacher, gpu=spec.gpu)
        requests = self._rings.enter_context(RequestRing.attach(spec.requests, role="consumer"))
        hidden = {
            rank: self._rings.enter_context(
                attach_hidden_ring(handle, placement=spec.placement, role="producer", device=self._teacher.device)
            )
            for rank, handle in enumerate(spec.hidden)
        }
        self._server = HiddenStatesServer(requests, hidden, timeout_s=spec.timeout_s)
        folder, device = Path(spec.folder), self._teacher.device
        self._trace = self._rings.enter_context(
            open_trace(spec.profile, folder, "teacher", spec.index, device, host_is_ahead=False)
        )
        ready = {"hidden_size": self._teacher.hidden_size, "dtype": str(self._teacher.dtype)}
        with os.fdopen(spec.ready_fd, "w") as announcement:
            announcement.write(json.dumps(ready) + "\n")

    def serve(self) -> None:
        with self._rings:
            self._server.serve(
                self._teacher.hidden_size,
                self._teacher.dtype,
                self._timed_prefill,
                idle=self._stop_with_parent,
                trace=self._trace,
            )

    def _timed_prefill(self, microbatch: Microbatch, out: torch.Tensor) -> float:
        start = time.perf_counter()
        if len(out):
            self._teacher.prefill(microbatch, out)
        return time.perf_counter() - start

    def _stop_with_parent(self) -> None:
        if os.getppid() != self._parent:
            raise SystemExit(0)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the launcher's, which ends us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    hide_progress_bars()
    _Worker(WorkerSpec.from_json(sys.argv[1])).serve()


if __name__ == "__main__":
    main()
