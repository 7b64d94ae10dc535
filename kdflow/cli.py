"""The command `kdflow`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kdflow.errors import KdflowError

USAGE = """\
usage: kdflow COMMAND ...

commands:
  train RUN.yaml [--OPTION.NAME=VALUE ...]   distil a student from a teacher
  plan RUN.yaml --rates GPU|FILE             memory, time, bottleneck and hours of a run, on paper
  export RUN [--checkpoint step-N|best]      write a checkpoint of a run as a Hugging Face model
  prune MODEL --num_layers N --output DIR    cut a model to fewer layers: a student to start from
  bench SUITE [--OPTION VALUE ...]           measure a checkout beside its peers and the hardware

`kdflow COMMAND --help` says more.
"""


def _train(arguments: Sequence[str]) -> int:
    # Read once, when torch loads OpenMP: threads that wait for work sleep instead of spinning, so
    # that teacher and student may both use every core (a fifth more tokens/s on two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from kdflow.config_file import config_parser, load_config

    if any(a in ("-h", "--help") for a in arguments):
        config_parser().print_help()
        return 0
    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    config = load_config(path, arguments[1:] if path is not None else arguments)
    from kdflow.launcher.local import run

    # 130 is what shells report for a command that Ctrl-C ended.
    return 0 if run(config) else 130


def _plan(arguments: Sequence[str]) -> int:
    from kdflow.plan.command import main

    return main(arguments)


def _export(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kdflow export",
        description="Writes a checkpoint as a Hugging Face folder: safetensors in bfloat16, config, generation config, "
        "tokenizer and chat template. Trains nothing and needs no GPU.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run (its output_dir)")
    parser.add_argument("--checkpoint", help="step-N, or best (default: the newest)")
    parser.add_argument("--output", help="folder to write (default: RUN/exports/step-N)")
    options = parser.parse_args(arguments)
    from kdflow.config_file import load_config
    from kdflow.launcher.prepare import CHECKPOINTS, CONFIG_FILE
    from kdflow.modeling import hide_progress_bars
    from kdflow.student import CheckpointFolder, export_checkpoint

    hide_progress_bars()
    run = Path(options.run)
    config = load_config(run / CONFIG_FILE)
    checkpoint = CheckpointFolder(run / CHECKPOINTS).find(options.checkpoint)
    output = Path(options.output) if options.output else run / "exports" / checkpoint.path.name
    export_checkpoint(checkpoint.path, config.student, output)
    print(f"{output}: step {checkpoint.info.num_steps_done} of {run}")
    return 0


def _prune(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kdflow prune",
        description="Keeps embeddings, final norm, head and evenly spaced layers of a model.",
    )
    parser.add_argument("model", help="folder or hub id")
    parser.add_argument("--num_layers", type=int, required=True, help="layers to keep")
    parser.add_argument("--output", required=True, help="folder to write, which must hold nothing")
    options = parser.parse_args(arguments)
    from kdflow.modeling import hide_progress_bars, prune_model

    hide_progress_bars()
    size = prune_model(options.model, options.num_layers, options.output) / 1e6
    print(f"{options.output}: {options.num_layers} layers, {size:.0f} million parameters")
    return 0


def _bench(arguments: Sequence[str]) -> int:
    checkout = Path(__file__).parents[1]
    if not (checkout / "bench" / "cli.py").is_file():
        raise KdflowError(
            "the benches come with the sources, and this kdflow was installed without them; "
            "clone the repository, `pip install -e .[bench]` there, and call it again"
        )
    sys.path.insert(0, str(checkout))
    from bench.cli import main

    return main(arguments)


COMMANDS = {"train": _train, "plan": _plan, "export": _export, "prune": _prune, "bench": _bench}


def main() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help", ""):
        print(USAGE, end="")
        sys.exit(0 if name else 2)
    if name == "--version":
        from kdflow import __version__

        print(__version__)
        sys.exit(0)
    if name not in COMMANDS:
        print(f"kdflow: unknown command {name!r}\n{USAGE}", end="", file=sys.stderr)
        sys.exit(2)
    try:
        sys.exit(COMMANDS[name](arguments))
    except KdflowError as error:
        print(f"kdflow {name}: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"kdflow {name}: interrupted", file=sys.stderr)
        sys.exit(130)
