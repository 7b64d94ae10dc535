"""The command line: choose cases, run them, write what came out."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from bench import check, compare, output, report, roofline
from bench.cases import ceilings, e2e, loss, ring, student, teacher
from bench.environment import environment
from bench.gpu import command as gpu
from bench.model import KEEP, Case, Row
from bench.sweep import Settings, run_case
from bench.timeline import read_tracks
from kdflow.errors import KdflowError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite or the comparison that ``arguments`` name; 2 for bad arguments."""
    options = _parser().parse_args(arguments)
    # As Ctrl-C does: leave through the code that ends the workers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a pipe has no width; 80 columns would break every cell
    try:
        if options.command == "compare":
            return compare.main(Path(options.before), Path(options.after), console)
        if options.command == "show":
            print(output.markdown(*output.read_results(Path(options.file))))
            return 0
        if options.command == "gpu":
            return gpu.main(options, console)
        if options.command == "roofline":
            return roofline.main(options, console)
        if options.command == "check":
            return _check(options, console)
        if options.command == "report":
            found = output.read_results(Path(options.file))
            if options.timeline:
                kept = Path(options.file).with_suffix(".timeline.json")
                read_tracks(Path(options.timeline))  # it is one
                shutil.copyfile(options.timeline, kept)
            console.print(f"wrote {os.path.relpath(report.write_report(Path(options.file), *found))}", highlight=False)
            return 0
        return _run(options, console)
    except (ValueError, FileNotFoundError, KdflowError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, console: Console) -> int:
    cases = _cases(options)
    if options.cases:
        names = [case.name for case in cases]
        cases = [case for case in cases if options.cases in case.name]
        if not cases:
            raise ValueError(f"--cases: no name contains {options.cases!r}; known: {names}")
    if options.providers:
        cases = [_only(case, options.providers) for case in cases]
    os.environ[KEEP] = str(_result_path(options).with_suffix("").absolute())
    _measure(cases, options, console)
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
    options.quick = True  # repetitions and budgets as well
    return check.conclude(_measure(check.cases(), options, console), console, update=options.update)


def _measure(cases: Sequence[Case], options: argparse.Namespace, console: Console) -> list[Row]:
    """Rows of all cases, which are written and drawn as well."""
    settings = Settings(
        reps=options.reps or (3 if options.quick else 7),
        budget_s=options.budget_s or (4.0 if options.quick else 30.0),
        num_threads=options.threads or len(os.sched_getaffinity(0)),
        deadline=time.monotonic() + options.deadline_s,
    )
    machine = environment(device=options.device, num_threads=settings.num_threads)
    path = _result_path(options)
    rows: list[Row] = []
    for case in cases:
        with console.status(case.name) as status:
            rows += (found := run_case(case, settings, say=status.update))
        output.print_case(found, console)
        # After every case, so that an interrupted run keeps what it measured.
        output.write_results(path, machine, rows)
    html = report.write_report(path, machine, rows)
    console.print(f"wrote {os.path.relpath(path)} and {os.path.relpath(html)}", highlight=False)
    return rows


# What takes longer to start than to measure: left out of `all --quick`, which is to be done in about a minute.
SLOW_STARTERS = {"torch.compile", "liger chunk 128", "ray", "trl GKDTrainer", "all layers' hidden states, Queue"}


def _cases(options: argparse.Namespace) -> list[Case]:
    found: list[Case] = []
    if options.command in ("ceilings", "all"):
        found += ceilings.cases(device=options.device, quick=options.quick)
    if options.command in ("loss", "all"):
        found += loss.cases(
            device=options.device,
            quick=options.quick,
            shapes=options.shapes,
            dtypes=options.dtype,
            divergences=options.divergence,
            backend=options.backend,
        )
    if options.command in ("ring", "all"):
        found += ring.cases(device=options.device, quick=options.quick, sizes=options.sizes)
    if options.command in ("teacher", "all"):
        found += teacher.cases(device=options.device, quick=options.quick)
    if options.command in ("student", "all"):
        found += student.cases(device=options.device, quick=options.quick)
    if options.command in ("e2e", "all"):
        found += e2e.cases(device=options.device, quick=options.quick)
    if options.command == "all" and options.quick and not options.providers:
        found = [replace(c, providers=tuple(p for p in c.providers if p.name not in SLOW_STARTERS)) for c in found]
    return found


def _only(case: Case, wanted: Sequence[str]) -> Case:
    """The case with the wanted providers and its floors."""
    known = [provider.name for provider in case.providers]
    if not set(wanted) & set(known):
        raise ValueError(f"--providers: none of {list(wanted)} is in {case.name!r}; known: {known}")
    kept = [p for p in case.providers if p.role in ("floor", "bound") or p.name in wanted]
    return replace(case, providers=tuple(kept))


def _result_path(options: argparse.Namespace) -> Path:
    if options.out:
        return Path(options.out).with_suffix(".jsonl")
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return output.RESULTS / f"{options.command}-{options.device.partition(':')[0]}-{stamp}.jsonl"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks beside peers and floors, all providers interleaved in one run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    shared.add_argument("--quick", action="store_true", help="small cases, about a minute")
    shared.add_argument("--cases", metavar="TEXT", help="only the cases whose name contains TEXT")
    shared.add_argument("--providers", nargs="+", default=[], metavar="NAME")
    shared.add_argument("--reps", type=int, help="repetitions of each provider (7; quick: 3)")
    shared.add_argument("--budget-s", type=float, help="seconds a provider may take in one case")
    shared.add_argument("--deadline-s", type=float, default=float("inf"), help="seconds after which the run ends")
    shared.add_argument("--threads", type=int, help="threads of each provider (all cores)")
    shared.add_argument("--out", metavar="PATH", help="result file (bench/results/...)")
    loss_options = argparse.ArgumentParser(add_help=False)
    loss_options.add_argument("--shapes", nargs="+", default=[], metavar="N,V,Hs,Ht")
    loss_options.add_argument("--dtype", nargs="+", default=[], choices=list(loss.ITEM_BYTES))
    loss_options.add_argument("--divergence", nargs="+", default=[], choices=["forward_kl", "jsd", "reverse_kl"])
    loss_options.add_argument("--backend", default="auto", help="of fused_kd_loss: auto (default), triton, torch")
    ring_options = argparse.ArgumentParser(add_help=False)
    ring_options.add_argument("--sizes", nargs="+", type=int, default=[], metavar="BYTES")
    commands.add_parser("ceilings", parents=[shared], help=_summary(ceilings))
    commands.add_parser("loss", parents=[shared, loss_options], help=_summary(loss))
    commands.add_parser("ring", parents=[shared, ring_options], help=_summary(ring))
    commands.add_parser("teacher", parents=[shared], help=_summary(teacher))
    commands.add_parser("student", parents=[shared], help=_summary(student))
    commands.add_parser("e2e", parents=[shared], help=_summary(e2e))
    commands.add_parser("all", parents=[shared, loss_options, ring_options], help="every suite")
    gpu.add_options(commands.add_parser("gpu", help="all that one GPU can tell: build, tests, suites and verdict"))
    roofline.add_options(commands.add_parser("roofline", help=_summary(roofline), description=roofline.__doc__))
    checking = commands.add_parser("check", parents=[shared], help=_summary(check), description=check.__doc__)
    checking.add_argument("--update", action="store_true", help="store this run's ratios in bench/check.json")
    comparison = commands.add_parser("compare", help="what changed between two result files")
    comparison.add_argument("before", metavar="A")
    comparison.add_argument("after", metavar="B")
    show = commands.add_parser("show", help="a result file as Markdown, for a document")
    show.add_argument("file", metavar="FILE")
    page = commands.add_parser("report", help="the HTML page of a result file")
    page.add_argument("file", metavar="FILE")
    page.add_argument(
        "--timeline", metavar="FILE", help="timeline.json of a run, to be drawn on the page and kept beside it"
    )
    return parser


def _summary(module: object) -> str:
    return (module.__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")
