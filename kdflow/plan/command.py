"""`kdflow plan RUN.yaml`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from rich.console import Console

from kdflow.config import RunConfig
from kdflow.config_file import load_config
from kdflow.errors import ConfigError, DataError
from kdflow.modeling import hide_progress_bars, resolve_device, resolve_dtype
from kdflow.plan.plan import WARM_UP_STEPS, Machine, Plan, make_plan
from kdflow.plan.printing import print_plan
from kdflow.plan.rates import GPUS, Rates, load_rates
from kdflow.plan.shapes import load_shape, load_teachers, teachers_of
from kdflow.plan.workload import Workload, data_workload, uniform_workload

SIMULATED_STEPS = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rates",
        required=True,
        metavar="GPU|FILE",
        help=f"{', '.join(GPUS)} (data sheets); a result file of `bench ceilings`; or a JSON file of rates",
    )
    parser.add_argument(
        "--gpus", type=int, help="GPUs of the run (default: one for each rank and each teacher's shard)"
    )
    parser.add_argument("--nodes", type=int, default=1, help="nodes that they are spread over (1)")
    parser.add_argument(
        "--tokens_per_sample", type=int, help="plan with samples of this length instead of reading data.train"
    )
    parser.add_argument("--loss_share", type=float, default=1.0, help="of their tokens, with --tokens_per_sample (1.0)")
    parser.add_argument("--steps", type=int, default=SIMULATED_STEPS, help=f"simulated ({SIMULATED_STEPS})")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kdflow plan",
        usage="kdflow plan RUN.yaml --rates GPU|FILE [--gpus N] [--nodes N] ... [--OPTION.NAME=VALUE ...]",
        description="Says on paper what a run needs: memory by part, time by part, what limits it, hours to its end. "
        "Reads the models' configs, not their weights; options of the config win over the file.",
    )
    parser.add_argument("config", metavar="RUN.yaml")
    add_options(parser)
    options, overrides = parser.parse_known_args(arguments)
    hide_progress_bars()
    beside = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    print_plan(plan_of(load_config(options.config, overrides), options, beside.print), Console())
    return 0


def plan_of(config: RunConfig, options: argparse.Namespace, say: Callable[[str], None]) -> Plan:
    """The plan of a run for the machine that the options describe.

    Args:
        say: told of data that is tokenised.

    Raises:
        ConfigError, DataError: an option or a model that cannot be, data that cannot be read.
    """
    _check(options)
    teachers = teachers_of(config).values()
    if any(teacher.is_base for teacher in teachers):
        raise ConfigError("teacher.backend: base has no process of its own, so there is no overlap to be planned")
    if not all(teacher.model for teacher in teachers):
        raise ConfigError(
            f"teacher.model: algorithm {config.algorithm.name} learns from a teacher, and none is given; name its "
            "folder or hub id (algorithm sft learns from text alone)"
        )
    rates = load_rates(options.rates)
    machine = make_machine(config, rates, num_gpus=options.gpus, num_nodes=options.nodes)
    workload = _workload(config, options, say)
    return make_plan(config, load_shape(config.student.model), load_teachers(config), workload, machine)


def make_machine(config: RunConfig, rates: Rates, *, num_gpus: int | None = None, num_nodes: int = 1) -> Machine:
    """A CPU is one device; else a GPU for each rank and each shard of a teacher, unless told otherwise."""
    teachers = teachers_of(config).values()
    wanted = config.student.num_ranks + sum(teacher.num_workers * teacher.tp_size for teacher in teachers)
    # A CPU's auto is asked of this one; every GPU has bfloat16.
    dtype = config.student.compute_dtype
    resolved = resolve_dtype(dtype, resolve_device("cpu")) if rates.shared or dtype != "auto" else torch.bfloat16
    return Machine(
        rates=rates,
        num_devices=1 if rates.shared else num_gpus or wanted,
        num_nodes=num_nodes,
        item=resolved.itemsize,
    )


def _check(options: argparse.Namespace) -> None:
    for name, low in (("gpus", 1), ("nodes", 1), ("tokens_per_sample", 2), ("steps", WARM_UP_STEPS + 1)):
        value = getattr(options, name)
        if value is not None and value < low:
            raise ConfigError(f"--{name}: expected at least {low}, got {value}")
    if not 0 < options.loss_share <= 1:
        raise ConfigError(f"--loss_share: expected more than 0 and at most 1, got {options.loss_share}")


def _workload(config: RunConfig, options: argparse.Namespace, say: Callable[[str], None]) -> Workload:
    num_ranks = config.student.num_ranks
    if config.student.context_parallel > 1:
        raise ConfigError(
            f"student.context_parallel: a plan knows ranks with microbatches of their own, got "
            f"{config.student.context_parallel}; plan with 1, and training.tokens_per_microbatch divided by it"
        )
    if options.tokens_per_sample is not None:
        if options.tokens_per_sample > config.training.tokens_per_microbatch:
            raise ConfigError(
                f"--tokens_per_sample: expected at most training.tokens_per_microbatch "
                f"{config.training.tokens_per_microbatch}, got {options.tokens_per_sample}"
            )
        return uniform_workload(
            config,
            options.steps,
            num_ranks,
            tokens_per_sample=options.tokens_per_sample,
            loss_share=options.loss_share,
        )
    try:
        return data_workload(config, options.steps, num_ranks, say=say)
    except (ConfigError, DataError) as error:
        raise type(error)(f"{error}; --tokens_per_sample N plans without the data") from None
