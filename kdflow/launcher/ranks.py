"""The student's ranks as processes of their own: started, told to stop, and ended together."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import spawn
from multiprocessing.connection import Connection, Pipe
from types import TracebackType

from rich.console import Console
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kdflow.errors import KdflowError, TransportError
from kdflow.launcher.environment import child_environment
from kdflow.launcher.rank import Place, RankSpec, run_rank

_GRACE_S = 5.0  # for a rank to tell what it failed with, after another one has failed; and to end
_TICK_S = 0.1
_PR_SET_PDEATHSIG = 1

# Of a rank: whether it came to its end, or what it failed with.
Outcome = bool | KdflowError | str


def run_ranks(spec: RankSpec, stop_requested: Callable[[], bool]) -> bool:
    """Trains on all ranks; False where they were asked to stop before the end.

    They meet at a store of this process, so it must live as long as they do; where it ends first, they are killed.
    Signals are this process's alone: it tells the ranks to stop, so that all stop after the same step.

    Raises:
        KdflowError: what the first rank failed with, after all others were ended.
    """
    student = spec.config.student
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        stack.callback(Console().show_cursor)  # which the bar of one that is killed leaves hidden
        ranks = [
            stack.enter_context(RankProcess(spec, Place(rank, student.num_ranks, store.port)))
            for rank in range(student.num_ranks)
        ]
        told = False
        running = list(ranks)
        deadline: float | None = None
        while running and (deadline is None or time.monotonic() < deadline):
            for rank in select.select(running, [], [], _TICK_S)[0]:
                rank.receive()
                running.remove(rank)
                if rank.has_failed and deadline is None:
                    deadline = time.monotonic() + _GRACE_S
            if stop_requested() and not told:
                told = True
                for rank in running:
                    rank.ask_to_stop()
        failed = [rank for rank in ranks if rank.has_failed]
        if failed:
            raise _cause(failed)
        return all(rank.outcome is True for rank in ranks)


def _cause(failed: list[RankProcess]) -> KdflowError:
    """Of several that failed: the others miss one that was killed, and say less of it than its own error does."""
    failed = sorted(failed, key=lambda rank: rank.ended_at)
    killed = [rank for rank in failed if rank.outcome is None]
    by_kdflow = [rank for rank in failed if isinstance(rank.outcome, KdflowError)]
    rank = [*killed, *by_kdflow, *failed][0]
    who = f"student rank {rank.number}"
    if rank.outcome is None:
        return TransportError(f"{who} ended with {rank.how_it_ended()}")
    if isinstance(rank.outcome, KdflowError):
        rank.outcome.args = (f"{who}: {rank.outcome}",)
        return rank.outcome
    return TransportError(f"{who} failed:\n{rank.outcome}")


class RankProcess:
    """One rank; leaving the `with` block ends it.

    Attributes:
        number: of the rank.
        outcome: None until it is received, and of one that ended without a word.
        ended_at: when it was received.
    """

    def __init__(self, spec: RankSpec, place: Place) -> None:
        self.number = place.rank
        self.outcome: Outcome | None = None
        self.ended_at = 0.0
        self._link, theirs = Pipe()
        with theirs, _signals_held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env=child_environment(
                    spec.num_threads, RANK=place.rank, LOCAL_RANK=place.rank, WORLD_SIZE=place.num_ranks
                ),
            )
        # As multiprocessing does it: so divergences and the like that the caller's main file registers are there, too.
        told = spawn.get_preparation_data(f"rank {place.rank}")
        self._tell({name: value for name, value in told.items() if name != "authkey"})
        self._tell((spec, place))

    def fileno(self) -> int:
        """Readable once it has told its outcome, or has ended."""
        return self._link.fileno()

    def ask_to_stop(self) -> None:
        self._tell(None)

    def _tell(self, what: object) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # it has ended, which `receive` sees
            self._link.send(what)

    def receive(self) -> None:
        try:
            self.outcome = self._link.recv()
        except (EOFError, ConnectionResetError):
            self._process.wait()
        self.ended_at = time.monotonic()

    @property
    def has_failed(self) -> bool:
        """Whether it has ended, and not by coming to its end or by being asked to stop."""
        return self.ended_at > 0 and not isinstance(self.outcome, bool)

    def how_it_ended(self) -> str:
        code = self._process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def __enter__(self) -> RankProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.close()
        try:
            self._process.wait(0.0 if kind is not None else _GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started meanwhile never gets them; this one does afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _main() -> None:
    fd, launcher = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it had ended before
        return
    with Connection(fd) as link:
        spawn.prepare(link.recv())
        spec, place = link.recv()
        outcome: Outcome
        try:
            outcome = run_rank(spec, place=place, stop_requested=link.poll)
        except KdflowError as error:
            outcome = error
        except Exception:
            outcome = traceback.format_exc()
        link.send(outcome)


if __name__ == "__main__":
    _main()
