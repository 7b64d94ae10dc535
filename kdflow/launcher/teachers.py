"""Teacher processes: started, watched, ended."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from kdflow.errors import TeacherDied, TeacherTimeout
from kdflow.teacher.worker import WorkerSpec

_LOG_LINES = 12


class TeacherProcess:
    """One worker process; leaving the `with` block ends it.

    Args:
        spec: what it is told, without `ready_fd`.
        log: file of its output.
    """

    def __init__(self, spec: WorkerSpec, log: Path) -> None:
        self._log = log
        self._ready_fd, write_fd = os.pipe()
        told = WorkerSpec(**{**vars(spec), "ready_fd": write_fd})
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "kdflow.teacher.worker", told.to_json()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_fd,),
                    env={**os.environ, "OMP_NUM_THREADS": str(spec.num_threads)},
                )
        finally:
            os.close(write_fd)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def wait_ready(self, timeout_s: float) -> dict[str, object]:
        """What the worker announced once its model was loaded.

        Raises:
            TeacherDied: it ended instead.
            TeacherTimeout: it took longer than `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        while not select.select([self._ready_fd], [], [], 0.2)[0]:
            self.check()
            if time.monotonic() > deadline:
                raise TeacherTimeout(
                    f"teacher {self.pid} did not load within {timeout_s:.0f} s; raise "
                    f"transport.start_timeout_s or look at {self._log}\n{self._tail()}"
                )
        with os.fdopen(os.dup(self._ready_fd)) as announcement:
            line = announcement.readline()
        if not line:
            self._process.wait()
            self.check()
        return json.loads(line)

    def check(self) -> None:
        """
        Raises:
            TeacherDied: the process has ended; the message ends with its last log lines.
        """
        code = self._process.poll()
        if code is not None:
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            raise TeacherDied(
                f"teacher process {self.pid} ended with {how}; its last lines ({self._log}):\n{self._tail()}"
            )

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-_LOG_LINES:])

    def __enter__(self) -> TeacherProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._ready_fd)
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
