"""The command line: choose cases, run them, write what came out."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

from rich.console import Console

from bench import check, compare, output, overview, report, roofline
from bench.cases import ceilings, e2e, loss, ring, student, teacher
from bench.cases.loss_case import ITEM_BYTES
from bench.environment import environment
from bench.gpu import command as gpu
from bench.model import KEEP, Case, Row
from bench.sweep import Settings, run_cases
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
        if options.command == "overview":
            return overview.main(output.RESULTS, console)
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
        cases = _only(cases, options.providers)
    os.environ[KEEP] = str(_result_path(options).with_suffix("").absolute())
    _measure(cases, options, console)
    return 0


def _check(options: argparse.Namespace, console: Console) -> int:
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
    with console.status("starting") as status, closing(run_cases(cases, settings, say=status.update)) as measured:
        for found in measured:
            rows += found
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
            sweep=options.sweep,
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


def _only(cases: Sequence[Case], wanted: Sequence[str]) -> list[Case]:
    """The cases that have any of the wanted providers, with these and their floors."""
    known = list(dict.fromkeys(p.name for case in cases for p in case.providers))
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--providers: no case has {unknown}; known: {known}")
    kept = [
        replace(case, providers=tuple(p for p in case.providers if p.role in ("floor", "bound") or p.name in wanted))
        for case in cases
    ]
    return [case for case in kept if {p.name for p in case.providers} & set(wanted)]


def _result_path(options: argparse.Namespace) -> Path:
    if options.out:
        return Path(options.out.removesuffix(".jsonl") + ".jsonl")
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return output.RESULTS / f"{options.command}-{options.device.partition(':')[0]}-{stamp}.jsonl"


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    return text


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmarks beside peers and floors, all providers interleaved in one run.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    running = argparse.ArgumentParser(add_help=False)
    running.add_argument("--reps", type=_positive(int), help="repetitions of each provider (7; quick: 3)")
    running.add_argument("--budget-s", type=_positive(float), help="seconds a provider may take in one case")
    running.add_argument(
        "--deadline-s", type=_positive(float), default=float("inf"), help="seconds after which the run ends"
    )
    running.add_argument("--threads", type=_positive(int), help="threads of each provider (all cores)")
    running.add_argument("--out", metavar="PATH", help="result file (bench/results/...)")
    shared = argparse.ArgumentParser(add_help=False, parents=[running])
    shared.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda, cuda:1, ...")
    shared.add_argument("--quick", action="store_true", help="small cases, about a minute")
    shared.add_argument("--cases", metavar="TEXT", help="only the cases whose name contains TEXT")
    shared.add_argument("--providers", nargs="+", default=[], metavar="NAME", help="only these, and the floors")
    loss_options = argparse.ArgumentParser(add_help=False)
    loss_options.add_argument("--shapes", nargs="+", default=[], metavar="N,V,Hs,Ht", help="rows, vocabulary, widths")
    loss_options.add_argument("--dtype", nargs="+", default=[], choices=list(ITEM_BYTES))
    loss_options.add_argument("--divergence", nargs="+", default=[], choices=["forward_kl", "jsd", "reverse_kl"])
    loss_options.add_argument("--backend", default="auto", help="of fused_kd_loss: auto (default), triton, torch")
    loss_options.add_argument("--sweep", action="store_true", help="lines over N, V and Hs in place of the other cases")
    ring_options = argparse.ArgumentParser(add_help=False)
    ring_options.add_argument(
        "--sizes", nargs="+", type=_positive(int), default=[], metavar="BYTES", help="of a message"
    )
    suites = {
        "loss": (loss, [shared, loss_options]),
        "ring": (ring, [shared, ring_options]),
        "teacher": (teacher, [shared]),
        "student": (student, [shared]),
        "e2e": (e2e, [shared]),
        "ceilings": (ceilings, [shared]),
    }
    raw = argparse.RawDescriptionHelpFormatter
    for name, (module, parents) in suites.items():
        commands.add_parser(
            name, parents=parents, help=_summary(module), description=module.__doc__, formatter_class=raw
        )
    commands.add_parser("all", parents=[shared, loss_options, ring_options], help="every suite")
    everything = commands.add_parser("gpu", help=_summary(gpu), description=gpu.__doc__)
    gpu.add_options(everything)
    roofline.add_options(commands.add_parser("roofline", help=_summary(roofline), description=roofline.__doc__))
    checking = commands.add_parser("check", parents=[running], help=_summary(check), description=check.__doc__)
    checking.set_defaults(device="cpu", quick=True)
    checking.add_argument("--update", action="store_true", help="store this run's ratios in bench/check.json")
    comparison = commands.add_parser("compare", help="what changed between two result files")
    comparison.add_argument("before", metavar="A")
    comparison.add_argument("after", metavar="B")
    show = commands.add_parser("show", help="a result file as Markdown, for a document")
    show.add_argument("file", metavar="FILE")
    commands.add_parser("overview", help=_summary(overview), description=overview.__doc__)
    page = commands.add_parser("report", help="the HTML page of a result file")
    page.add_argument("file", metavar="FILE")
    page.add_argument(
        "--timeline", metavar="FILE", help="timeline.json of a run, to be drawn on the page and kept beside it"
    )
    return parser


def _summary(module: object) -> str:
    return (module.__doc__ or "").partition("\n")[0].partition(": ")[2].rstrip(".")
