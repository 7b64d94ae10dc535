"""One provider's process: ``python -m bench.worker``, JSON lines in on stdin and out on stdout.

    {"do": "setup", "entry": "module:function", "params": {...}}   -> {"note": ...}
    {"do": "step"}                                                 -> {"seconds": ..., ...}
    {"do": "memory"}                                               -> {"peak_mib", "kept_mib"}
    {"do": "check"}                                                -> values to agree on
    {"do": "rest"}                                                 -> nothing; ready for another setup

A failure answers ``{"error": ..., "unavailable": bool}``. What libraries print goes to stderr.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Mapping
from typing import Any

from bench.environment import scrub
from bench.memory import MIB, peak_of, resident_mib, settle
from bench.model import Trial, UnavailableError
from bench.timing import time_on_stream, time_step

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h


class Worker:
    def __init__(self) -> None:
        self.trial: Trial | None = None
        self.device = "cpu"
        self.resident_after_setup = 0.0

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "setup":
                return self.setup(request["entry"], request["params"])
            case "step":
                return self.step()
            case "memory":
                return self.memory()
            case "check":
                assert self.trial is not None
                return dict(self.trial.check()) if self.trial.check else {}
            case "rest":
                return self.rest()
            case other:
                raise AssertionError(f"unknown request {other!r}")

    def setup(self, entry: str, params: Mapping[str, Any]) -> dict[str, Any]:
        module, _, function = entry.partition(":")
        self.device = params.get("device", "cpu")
        self.trial = getattr(importlib.import_module(module), function)(params)
        assert isinstance(self.trial, Trial)
        self.resident_after_setup = resident_mib()
        return {"note": self.trial.note}

    def step(self) -> dict[str, float]:
        assert self.trial is not None
        self._prepare()
        if self.trial.on_stream and self.device.startswith("cuda"):
            return time_on_stream(self.trial.step, prepare=self._prepare)
        return time_step(self.trial.step, device=self.device)

    def memory(self) -> dict[str, float]:
        assert self.trial is not None
        self._prepare()
        settle()
        kept = resident_mib() - self.resident_after_setup
        peak = peak_of(self.trial.step, device=self.device)
        return {"peak_mib": peak - self.trial.gradient_bytes / MIB, "kept_mib": kept}

    def _prepare(self) -> None:
        if self.trial is not None and self.trial.prepare is not None:
            self.trial.prepare()

    def rest(self) -> dict[str, Any]:
        """Give back what the trial held."""
        self.close()
        settle()
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.empty_cache()
        return {}

    def close(self) -> None:
        if self.trial is not None and self.trial.close is not None:
            self.trial.close()
        self.trial = None


def main() -> None:
    # The answers keep the real stdout to themselves; everything else that prints gets stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    _end_with_parent()
    try:
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = worker.answer(request)
            # Any failure of any provider must become its row's note, so this catches everything.
            except Exception as error:
                unavailable = isinstance(error, (ImportError, UnavailableError))
                name = "" if isinstance(error, UnavailableError) else f"{type(error).__name__}: "
                text = scrub(f"{name}{error}".splitlines()[0])
                reply = {"error": text[:300], "unavailable": unavailable}
                traceback.print_exc()
            print(json.dumps(reply), file=answers, flush=True)
    finally:
        worker.close()


def _end_with_parent() -> None:
    """Leave in good order, children and all, on SIGTERM, which also comes when the parent dies."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
