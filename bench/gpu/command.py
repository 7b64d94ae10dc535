"""``bench gpu``: all that one GPU can tell: build, tests, suites, and a verdict on each goal.

The parts run one after the other. Everything found so far is written after every case, so that a
run that is ended from outside leaves it behind. A part that fails or runs out of time never hides
another one, and what one does not need of its time is left to those after it.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from bench import output, report
from bench.client import ROOT
from bench.environment import environment
from bench.gpu import summary, verdict
from bench.gpu.parts import Part, Result, Setting, parts, shape_names
from bench.model import Row

WRITING_S = 15.0  # kept of the budget for the report


def add_options(parser: argparse.ArgumentParser) -> None:
    names = ",".join(part.name for part in parts(rehearse=False))
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:1, ...")
    parser.add_argument("--parts", default=names, metavar="NAMES", help=f"of {names} (default: all)")
    parser.add_argument("--budget", type=float, default=450.0, metavar="SECONDS", help="for the whole command (450)")
    parser.add_argument("--quick", action="store_true", help="the small cases of every suite")
    parser.add_argument("--rehearse", action="store_true", help="on this CPU: Triton's interpreter, tiny shapes")
    parser.add_argument("--out", metavar="DIR/STEM", help="of the files (bench/results/gpu-NAME-DATE)")
    parser.add_argument("--revision", help="of the sources, where they are a copy without their history")


def main(options: argparse.Namespace, console: Console) -> int:
    """0 when every part ran to its end, whatever the verdict; else 1."""
    chosen = _chosen(options)
    deadline = time.monotonic() + options.budget
    device = "cpu" if options.rehearse else options.device
    machine = environment(device=device, num_threads=len(os.sched_getaffinity(0)))
    if not options.rehearse and machine["gpu"] is None and not list(Path("/dev").glob("nvidia[0-9]*")):
        raise ValueError("gpu: no NVIDIA GPU is here; --rehearse runs it all on a CPU, with tiny shapes")
    if options.revision:
        machine["git"] = {"revision": options.revision, "dirty": None}
    stem = Path(options.out) if options.out else _stem(options, machine)
    stem.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, Path(f"{stem}.log").open("wb") as log:
        run = _Run(machine, Path(f"{stem}.jsonl"), shape_names(rehearse=options.rehearse), console)
        setting = Setting(device, options.quick, options.rehearse, Path(folder), log)
        for index, part in enumerate(chosen):
            left = deadline - WRITING_S - time.monotonic()
            run.part(part, setting, left * part.seconds / sum(p.seconds for p in chosen[index:]), log)
    html = report.write_report(run.path, run.record(), run.rows)
    summary.print_all(run.results, run.rows, run.findings(), console, rehearsal=options.rehearse)
    files = ", ".join(os.path.relpath(path) for path in (run.path, html, f"{stem}.log"))
    console.print(f"wrote {files} in {options.budget - deadline + time.monotonic():.0f} s", highlight=False)
    return 0 if all(result.status == "ok" for result in run.results.values()) else 1


class _Run:
    """What the parts found, kept in the file at ``path``."""

    def __init__(self, machine: dict[str, Any], path: Path, names: dict[str, str], console: Console):
        self.path = path
        self.results: dict[str, Result] = {}
        self._machine = machine
        self._names = names
        self._console = console

    @property
    def rows(self) -> list[Row]:
        return [row for result in self.results.values() for row in result.rows]

    def findings(self) -> list[verdict.Finding]:
        return verdict.judge(self.rows, self._names)

    def record(self) -> dict[str, Any]:
        """The environment with what is no row: the parts and the verdict."""
        found = {
            name: {"status": result.status, "note": result.note, **result.found}
            for name, result in self.results.items()
        }
        return {**self._machine, "parts": found, "verdict": [finding.as_json() for finding in self.findings()]}

    def part(self, part: Part, setting: Setting, limit_s: float, log: IO[bytes]) -> None:
        start = time.monotonic()
        log.write(f"\n==== {part.name}, at most {limit_s:.0f} s\n".encode())
        log.flush()

        def watch(result: Result) -> None:
            if len(result.rows) > self._num_rows(part.name) or result.found:
                self._keep(part.name, result)

        if limit_s < 1:
            result = Result("cut", "not begun: no time was left")
        else:
            try:
                result = part.run(setting, limit_s, watch)
            # Whatever goes wrong with one part must not keep the others from running.
            except Exception as error:
                result = Result("failed", f"{type(error).__name__}: {error}"[:300])
        self._keep(part.name, result)
        line = f"{part.name}: {result.status} in {time.monotonic() - start:.0f} s {result.note}"
        self._console.print(line, highlight=False, markup=False)

    def _num_rows(self, name: str) -> int:
        return len(self.results[name].rows) if name in self.results else 0

    def _keep(self, name: str, result: Result) -> None:
        if not result.rows and name in self.results and self.results[name].rows:
            result = Result(result.status, result.note, self.results[name].rows, result.found)
        self.results[name] = result
        output.write_results(self.path, self.record(), self.rows)


def _chosen(options: argparse.Namespace) -> list[Part]:
    known = parts(rehearse=options.rehearse)
    wanted = options.parts.split(",")
    if unknown := set(wanted) - {part.name for part in known}:
        raise ValueError(f"--parts: unknown {sorted(unknown)}; known: {[part.name for part in known]}")
    return [part for part in known if part.name in wanted]


def _stem(options: argparse.Namespace, machine: dict[str, Any]) -> Path:
    if options.rehearse:
        return ROOT / "build" / "gpu-rehearsal"
    words = re.findall(r"[a-z0-9]+", machine["gpu"]["name"].lower()) if machine["gpu"] else []
    name = next((word for word in words if word != "nvidia"), "unknown")
    return output.RESULTS / f"gpu-{name}-{datetime.now(timezone.utc):%Y-%m-%d}"
