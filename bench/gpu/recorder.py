"""A pytest plugin (``-p bench.gpu.recorder``): one JSON line for each test as soon as it is over,
into the file that ``BENCH_TEST_RECORD`` names, so that a run that is cut keeps what it found."""

from __future__ import annotations

import json
import os
from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    if report.when != "call" and report.outcome == "passed":
        return
    message = ""
    if report.outcome == "failed":
        message = str(report.longrepr).strip().splitlines()[-1][:300]
    elif report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        message = str(report.longrepr[2])[:300]
    _write({"test": report.nodeid, "outcome": report.outcome, "when": report.when, "message": message})


def pytest_collectreport(report: Any) -> None:
    if report.outcome == "failed":
        message = str(report.longrepr).strip().splitlines()[-1][:300]
        _write({"test": report.nodeid, "outcome": "failed", "when": "collect", "message": message})


def _write(record: dict[str, str]) -> None:
    with open(os.environ["BENCH_TEST_RECORD"], "a") as file:
        file.write(json.dumps(record) + "\n")
