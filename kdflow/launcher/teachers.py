"""Teacher processes: started, watched, started again, ended."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from kdflow.errors import TeacherDied, TeacherTimeout
from kdflow.launcher.environment import child_environment
from kdflow.teacher.worker import ENGINE_DIED, WorkerSpec
from kdflow.transport import Seats

_LOG_LINES = 12
_TICK_S = 0.1


class TeacherProcess:
    """One worker process; leaving the `with` block ends it.

    Once it was ready it is watched: killed by a signal, or ended because its engine died, it is started again, as often
    as `teacher.max_restarts` says; one that died asleep when the teachers' turn comes. Meanwhile its seats at the rings
    are kept, so that students wait; what it was asked for and had not begun goes to the next worker, what it was
    writing the student asks for again.

    Args:
        spec: what it is told, without `ready_fd`.
        log: file of its output.
        say: told of each new start.
    """

    def __init__(self, spec: WorkerSpec, log: Path, say: Callable[[str], None] = print) -> None:
        self._spec = spec
        self._log = log
        self._say = say
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._restart_failure = ""
        self._restarts_left = spec.teacher.max_restarts
        self._seats = Seats(spec.requests, spec.hidden, spec.turns) if self._restarts_left else None
        self._start()

    def _start(self) -> None:
        ready_fd, write_fd = os.pipe()
        told = WorkerSpec(**{**vars(self._spec), "ready_fd": write_fd})
        try:
            with self._log.open("ab") as output:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "kdflow.teacher.worker", told.to_json()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(write_fd,),
                    env=child_environment(self._spec.num_threads),
                )
        except OSError:
            os.close(ready_fd)
            raise
        finally:
            os.close(write_fd)
        self._ready_fd = ready_fd

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        return self._process.poll()

    def fileno(self) -> int:
        """Readable once the worker has announced that its model is loaded, or has ended."""
        return self._ready_fd

    def wait_ready(self, timeout_s: float) -> None:
        """As `wait_ready` of this one alone."""
        wait_ready([self], timeout_s)

    def watch(self) -> None:
        """From now on it is started again; called once `fileno` is readable.

        Raises:
            TeacherDied: it ended instead of announcing itself.
        """
        if not os.read(self._ready_fd, 1):
            self._process.wait()
            self.check()
        if self._seats is not None and self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="teacher-watch", daemon=True)
            self._watcher.start()

    @property
    def is_watched(self) -> bool:
        return self._watcher is not None and self._watcher.is_alive()

    def _watch(self) -> None:
        """Starts it again while that may help and somebody asks; then, or where that fails, gives the seats up."""
        assert self._seats is not None
        try:
            self._restart_while_asked(self._seats)
        except OSError as error:
            self._restart_failure = f" and could not be started again: {error}"
        finally:
            self._seats.leave()

    def _restart_while_asked(self, seats: Seats) -> None:
        had_students = False
        while not self._closing.wait(_TICK_S):
            has_students = seats.has_students()
            if had_students and not has_students:
                break
            had_students = had_students or has_students
            code = self.exit_code
            if code is None:
                continue
            if not (code < 0 or code == ENGINE_DIED) or self._restarts_left == 0:
                break
            if seats.students_have_the_turn():  # and the memory that it would load into
                continue
            self._restarts_left -= 1
            self._say(
                f"teacher process {self.pid} ended ({_how(code)}) and is started again, "
                f"{self._restarts_left} more times at most; its log is {self._log}"
            )
            ready_fd = self._ready_fd
            self._start()
            os.close(ready_fd)

    def check(self) -> None:
        """
        Raises:
            TeacherDied: the process has ended; the message ends with its last log lines.
        """
        code = self._process.poll()
        if code is not None:
            raise TeacherDied(
                f"teacher process {self.pid} ended with {_how(code)}{self._restart_failure}; {self.last_lines()}"
            )

    def last_lines(self) -> str:
        """Of its log, for an error."""
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as error:
            lines = [str(error)]
        return "\n".join([f"its last lines ({self._log}):", *(f"  {line}" for line in lines[-_LOG_LINES:])])

    def __enter__(self) -> TeacherProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.set()
        if self._watcher is not None:
            self._watcher.join()
        elif self._seats is not None:
            self._seats.leave()
        os.close(self._ready_fd)
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def wait_ready(teachers: Sequence[TeacherProcess], timeout_s: float) -> None:
    """Until each has loaded its model; from then on it is watched.

    Raises:
        TeacherDied: one ended instead, or one that may not be started again while others load.
        TeacherTimeout: together they took longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    loading = list(teachers)
    while loading:
        for teacher in select.select(loading, [], [], 0.2)[0]:
            teacher.watch()
            loading.remove(teacher)
        for teacher in teachers:
            if not teacher.is_watched:
                teacher.check()
        if loading and time.monotonic() > deadline:
            raise TeacherTimeout(
                f"teacher process {loading[0].pid} did not load within {timeout_s:g} s; raise "
                f"transport.start_timeout_s, or look at {loading[0].last_lines()}"
            )


def check_teachers(teachers: Sequence[TeacherProcess], grace_s: float = 5.0) -> None:
    """After an error of the rings: was it a teacher? One whose engine died needs a moment to end.

    Raises:
        TeacherDied: one has ended, or does so within `grace_s`.
    """
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline:
        for teacher in teachers:
            if teacher.exit_code:  # 0 is that of one whose students have gone
                teacher.check()
        time.sleep(_TICK_S)


def _how(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
