"""``python -m bench.tune``: the parts of the fused loss on a GPU, each beside what the hardware allows.

Times the products whole and in groups, the row kernels in their layouts, and the loss as it comes out of them: what the
constants of ``kdflow_kernels.triton_backend`` were chosen by. Prints a line for each; times are medians. A variant of
the whole loss is timed in turn with the loss as it comes, and what counts is their ratio: clocks drift by more than
most variants gain. Rows in clusters are compared with the Triton kernel's before they are timed, and then with a clock
in the kernel: how much of its time goes to memory, barriers and arithmetic.

Each part is a process of its own with its share of the budget: one that faults, waits for ever or takes too long ends
alone.
"""

from __future__ import annotations

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.environment import environment
from bench.gpu import process
from bench.gpu.parts import Setting
from bench.tune import clusters, losses, products, rows
from bench.tune.measure import RECORDS, Shape, record


@dataclass(frozen=True)
class Part:
    """``seconds`` is what it takes by estimate, with the start of its process; parts share the time in this ratio."""

    name: str
    seconds: float
    run: Callable[[Shape], None]


# In the order of their worth, should time run out.
PARTS: Sequence[Part] = (
    Part("gemms", 25, products.gemms),
    *(Part(f"clusters:{name}", 45, functools.partial(clusters.time_clusters, divergence=name))
      for name in clusters.DIVERGENCES),
    Part("clusters:circumstances", 25, clusters.circumstances),
    Part("rows", 40, rows.time_rows),
    Part("loss", 90, losses.time_losses),
    Part("layouts", 80, rows.time_layouts),
)  # fmt: skip
USUAL = "gemms,clusters,rows,loss"


def main(arguments: list[str] | None = None) -> int:
    names = ",".join(part.name for part in PARTS)
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__)
    parser.add_argument("--shape", default="8192,151936,2560,2048", metavar="N,V,Hs,Ht")
    parser.add_argument("--parts", default=USUAL, help=f"of {names}; clusters: all of its divergences ({USUAL})")
    parser.add_argument("--budget", type=float, default=420.0, metavar="SECONDS", help="for the whole command (420)")
    parser.add_argument("--out", help="file for the figures as JSON lines")
    parser.add_argument("--here", action="store_true", help="in this process and without a limit of time")
    given = parser.parse_args(arguments)
    wanted = given.parts.split(",")
    if unknown := [name for name in wanted if not any(_is(part, name) for part in PARTS)]:
        parser.error(f"--parts: unknown {unknown}; known: {names}")
    chosen = [part for part in PARTS if any(_is(part, name) for name in wanted)]
    if not torch.cuda.is_available():
        print("bench.tune needs a CUDA device", file=sys.stderr)
        return 2
    if given.here:
        return _here(chosen, given)
    if given.out:
        Path(given.out).parent.mkdir(parents=True, exist_ok=True)
        Path(given.out).write_text("")
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting("cuda", quick=False, rehearse=False, folder=Path(folder), log=sys.stdout.buffer)
        options = ["--shape", given.shape, *(["--out", given.out] if given.out else [])]
        here = [sys.executable, "-m", "bench.tune", "--here", *options]
        return run_all(chosen, setting, given.budget, lambda part: [*here, "--parts", part.name])


def _is(part: Part, name: str) -> bool:
    return name in (part.name, part.name.partition(":")[0])


def _here(chosen: list[Part], given: argparse.Namespace) -> int:
    if given.out:
        RECORDS.append(open(given.out, "a"))  # noqa: SIM115
    record(
        {"part": "machine", "name": ",".join(part.name for part in chosen), **environment(device="cuda", num_threads=1)}
    )
    s = Shape(given.shape)
    for part in chosen:
        part.run(s)
    return 0


def run_all(chosen: Sequence[Part], setting: Setting, budget_s: float, command_of: Callable[[Part], list[str]]) -> int:
    """1 where a part did not come to its end."""
    deadline, bad = time.monotonic() + budget_s, 0
    for index, part in enumerate(chosen):
        left = deadline - process.GRACE_S - time.monotonic()
        limit = left * part.seconds / sum(other.seconds for other in chosen[index:])
        begun, code = time.monotonic(), None
        try:
            if limit > 1:
                code = process.run(command_of(part), env=setting.env, log=setting.log, timeout_s=limit)
        except subprocess.TimeoutExpired:  # it could not be killed: the driver holds it
            pass
        how = {0: "ok", None: "cut: its time ran out"}.get(code, f"ended with {code}")
        bad += code != 0
        print(f"{part.name}: {how} in {time.monotonic() - begun:.0f} s", flush=True)
    return 1 if bad else 0
