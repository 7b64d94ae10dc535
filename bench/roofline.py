"""``bench roofline``: a job on paper with this machine's measured rates, and how far that is from a measured run.

The arithmetic is ``kdflow plan``'s. ``--against FILE`` takes the job that a stored ``bench e2e`` run did, and the rate
of matrix products from that run's own floor, so that the machine's load then and now does not enter the comparison.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.cases import ceilings
from bench.cases.e2e_job import run_overrides
from bench.client import ROOT
from bench.environment import environment
from bench.model import Row
from bench.output import read_results, write_results
from bench.sweep import Settings, run_case
from kdflow.config import RunConfig
from kdflow.config_file import load_config
from kdflow.plan import Plan, Rates, load_rates, make_plan, work
from kdflow.plan.command import make_machine
from kdflow.plan.plan import WARM_UP_STEPS
from kdflow.plan.printing import print_plan
from kdflow.plan.shapes import ModelShape, load_shape, load_teachers
from kdflow.plan.workload import Workload, data_workload

MEASURED_RATES = ROOT / "build" / "rates.jsonl"
NUM_STEPS = 5


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", default="examples/quickstart.yaml", help="of the job (examples/quickstart.yaml)")
    parser.add_argument("--rates", metavar="GPU|FILE", help="as for kdflow plan; without it they are measured now")
    parser.add_argument("--device", default="cpu", help="whose rates are measured: cpu (default), cuda, ...")
    parser.add_argument(
        "--against", metavar="FILE", help="a result file of `bench e2e`: predict it and state the error"
    )
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"timed ones, without --against ({NUM_STEPS})")
    parser.add_argument("overrides", nargs="*", metavar="--OPTION.NAME=VALUE", help="of the config, after `--`")


def main(options: argparse.Namespace, console: Console) -> int:
    against = Path(options.against).absolute() if options.against else None
    rates = load_rates(options.rates or str(_measure(options.device, console)))
    os.chdir(ROOT)  # the config's paths are relative to the checkout
    if against:
        _compare(against, rates, console)
        return 0
    config = load_config(options.config, options.overrides)
    workload = data_workload(config, WARM_UP_STEPS + options.steps, config.student.num_ranks)
    print_plan(_plan(config, rates, workload), console)
    return 0


def _measure(device: str, console: Console) -> Path:
    """The ceilings of this machine, now."""
    settings = Settings(num_threads=len(os.sched_getaffinity(0)), budget_s=4.0, deadline=time.monotonic() + 120)
    machine = environment(device=device, num_threads=settings.num_threads)
    rows: list[Row] = []
    for case in ceilings.cases(device=device, quick=True):
        with console.status(f"rates: {case.name}"):
            rows += run_case(case, settings, say=lambda text: None)
    write_results(MEASURED_RATES, machine, rows)
    return MEASURED_RATES


def _plan(config: RunConfig, rates: Rates, workload: Workload) -> Plan:
    return make_plan(
        config, load_shape(config.student.model), load_teachers(config), workload, make_machine(config, rates)
    )


@dataclass(frozen=True)
class Error:
    """One figure on paper and as measured."""

    name: str
    paper: float
    measured: float

    @property
    def percent(self) -> float:
        return 100 * (self.paper / self.measured - 1)


def _compare(path: Path, rates: Rates, console: Console) -> None:
    plan, errors = compare_with(path, rates)
    print_plan(plan, console)
    table = Table(title=f"on paper against {path.name}", title_justify="left")
    for name in ("figure", "paper", "measured", "error"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for error in errors:
        table.add_row(error.name, f"{error.paper:,.4g}", f"{error.measured:,.4g}", f"{error.percent:+.0f}%")
    console.print(table)


def compare_with(path: Path, rates: Rates) -> tuple[Plan, list[Error]]:
    """The plan of the job that ``bench e2e`` stored in a file, and its errors.

    Raises:
        ValueError: the file holds no finished run of kdflow with its floor.
    """
    _, rows = read_results(path)
    ours = _row(path, rows, role="ours")
    floor = _row(path, rows, role="floor")
    config, workload = _job(ours.params)
    shapes = load_shape(config.student.model), load_shape(config.teacher.model)
    flops = floor_flops(*shapes, workload)
    assert floor.median_s is not None
    assert ours.rate is not None
    assert ours.peak_mib is not None
    plan = _plan(config, replace(rates, matmul_flops=flops / floor.median_s), workload)
    both = plan.student_memory.total + plan.teacher_memory[""].total
    return plan, [
        Error("tokens/s", plan.tokens_per_s, ours.rate),
        Error(
            "share of the time in which the teacher prefills", plan.outcome.teacher_busy, ours.metrics["prefill_share"]
        ),
        Error("peak memory of both processes, MiB", both / 2**20, ours.peak_mib),
    ]


def _row(path: Path, rows: Sequence[Row], *, role: str) -> Row:
    found = [row for row in rows if row.suite == "e2e" and row.role == role and row.median_s]
    if not found:
        raise ValueError(f"--against: {path}: expected a finished `bench e2e` run with {role} in it, found none")
    return found[0]


def _job(params: Any) -> tuple[RunConfig, Workload]:
    """What was configured, and the steps that were measured, with the one before them."""
    config = load_config(params["config"], run_overrides(params, "unused"))
    warm_up, measured = params["num_warm_up_steps"], params["num_measured_steps"]
    workload = data_workload(
        config, WARM_UP_STEPS + measured, config.student.num_ranks, first_step=warm_up - WARM_UP_STEPS
    )
    return config, workload


def floor_flops(student: ModelShape, teacher: ModelShape, workload: Workload) -> float:
    """Of the products that the floor of ``bench e2e`` times, in which attention has no part."""
    total = 0.0
    for step in workload.steps[WARM_UP_STEPS:]:
        for piece in (piece for ranks in step for piece in ranks):
            teachers = work.linear_flops(teacher, piece.num_tokens) + 2 * piece.num_rows * teacher.head_params
            students = work.linear_flops(student, piece.num_tokens) + 2 * piece.num_rows * student.head_params
            total += teachers + 3 * students
    return total
