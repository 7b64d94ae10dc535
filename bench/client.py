"""The parent's end of a worker process: start, ask with a timeout, stop."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.environment import scrub
from bench.model import Case, Provider, Status

ROOT = Path(__file__).resolve().parent.parent


class WorkerError(Exception):
    """The worker answered with an error, died, or let its time run out."""

    def __init__(self, message: str, status: Status):
        super().__init__(message)
        self.status: Status = status


class WorkerClient:
    """A provider's process, alive until ``close`` so that its repetitions can be interleaved."""

    def __init__(self, provider: Provider, *, num_threads: int):
        self.provider = provider
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        env = {
            **os.environ,
            "OMP_NUM_THREADS": str(num_threads),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
            **dict(provider.env),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=env,
            # Its own process group: what a provider leaves behind is ended with it.
            start_new_session=True,
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._process.stdout, selectors.EVENT_READ)
        self._buffer = b""

    def ask(self, do: str, *, timeout_s: float, **values: Any) -> dict[str, Any]:
        """One request and its answer; raises ``WorkerError`` and ends the process on failure."""
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": do, **values}).encode() + b"\n")
            self._process.stdin.flush()
            reply = json.loads(self._read_line(timeout_s))
        except TimeoutError:
            self.close()
            raise WorkerError(f"{do} took longer than {timeout_s:.0f} s", "cut") from None
        except (EOFError, BrokenPipeError):
            self.close()
            raise WorkerError(self._epitaph(do), "failed") from None
        if "error" in reply:
            self.close()
            raise WorkerError(reply["error"], "unavailable" if reply["unavailable"] else "failed")
        return reply

    def close(self) -> None:
        """End the process and whatever it started; safe to call twice."""
        process = self._process
        if process.poll() is None:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=0.5)
            except subprocess.TimeoutExpired:
                self._signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=5)
        self._signal(signal.SIGKILL)
        process.wait(timeout=30)

    def stderr(self) -> str:
        self._stderr.seek(0)
        return self._stderr.read().decode(errors="replace")

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                raise EOFError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _epitaph(self, do: str) -> str:
        code = self._process.returncode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else code
        lines = [line for line in self.stderr().splitlines() if line.strip()]
        return scrub(f"died in {do} ({how}): {lines[-1] if lines else 'no output'}")[:300]


class WorkerPool:
    """Processes that one case leaves to the next one of its pool, see ``Case.worker_pool``."""

    def __init__(self) -> None:
        self._name = ""
        self._resting: dict[tuple[object, ...], WorkerClient] = {}

    def open(self, case: Case) -> None:
        """Keep the processes if ``case`` is of the same pool, else end them."""
        if case.worker_pool != self._name:
            self.close()
        self._name = case.worker_pool

    def take(self, provider: Provider, *, num_threads: int) -> WorkerClient:
        return self._resting.pop(_identity(provider), None) or WorkerClient(provider, num_threads=num_threads)

    def give(self, clients: Sequence[WorkerClient]) -> None:
        """Take them back from a case: to rest where it has a pool, else to their end."""
        if not self._name:
            self._end(clients)
            return
        for client in clients:
            with contextlib.suppress(WorkerError):
                client.ask("rest", timeout_s=10.0)
                self._resting[_identity(client.provider)] = client

    def close(self) -> None:
        self._end(list(self._resting.values()))
        self._resting.clear()

    @staticmethod
    def _end(clients: Sequence[WorkerClient]) -> None:
        if clients:
            with ThreadPoolExecutor(len(clients)) as executor:
                list(executor.map(WorkerClient.close, clients))


def _identity(provider: Provider) -> tuple[object, ...]:
    return provider.entry, provider.env
