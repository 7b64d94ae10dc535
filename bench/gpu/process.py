"""One command with a time limit, its output in a log, and nothing of it left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from bench.client import ROOT
from bench.memory import process_tree

POLL_S = 0.5
GRACE_S = 10.0


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log: IO[bytes],
    timeout_s: float,
    watch: Callable[[], None] = lambda: None,
) -> int | None:
    """The exit code, or None where the time ran out; ``watch`` is called now and then meanwhile."""
    log.write(f"\n$ {' '.join(Path(word).name if word.startswith('/') else word for word in command)}\n".encode())
    log.flush()
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + timeout_s
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=POLL_S)
            watch()
        return None
    finally:
        _end(process)
        watch()


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM first, so that suites end their workers; then whatever of the tree still lives."""
    if process.poll() is not None:
        return
    tree = process_tree(process.pid)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=GRACE_S)
    for pid in tree:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(timeout=GRACE_S)
