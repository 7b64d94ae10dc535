"""Functions run in fresh interpreters: for code that must not be forked, as all that uses CUDA."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

RUN = "import importlib, json, sys; m, f, a = sys.argv[1:]; getattr(importlib.import_module(m), f)(*json.loads(a))"


class Spawned:
    """A process that runs a module-level function, given by itself or as "module:function".

    `args` are JSON. What it prints is read line by line, with a timeout.
    """

    def __init__(self, function: Callable[..., Any] | str, *args: Any, env: Mapping[str, str] | None = None) -> None:
        if isinstance(function, str):
            module, _, name = function.partition(":")
        else:
            module, name = function.__module__, function.__name__
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN, module, name, json.dumps(args)],
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **(env or {})},
        )
        self.pid = self._process.pid

    def line(self, timeout_s: float = 60.0) -> str:
        """The next line it prints."""
        assert self._process.stdout is not None
        text = b""
        while not text.endswith(b"\n"):
            assert select.select([self._process.stdout], [], [], timeout_s)[0], f"no line within {timeout_s} s"
            byte = self._process.stdout.read(1)
            assert byte, f"it ended with {self.join()} before it printed a line: {text!r}"
            text += byte
        return text.decode().strip()

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert self.join() == -signal.SIGKILL

    def join(self, timeout_s: float = 120.0) -> int:
        """Exit code, or minus the signal."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()


def say(line: str) -> None:
    """For the function in the process: print a line that Spawned.line() reads."""
    print(line, flush=True)


def until(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Polls until the condition is true, and returns what it then is."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.0005)
    return found
