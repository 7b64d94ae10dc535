"""How fast a machine is: measured by `bench ceilings`, or as its maker states.

Stated peaks are never reached; ATTAINED is what this project has measured of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from kdflow.errors import ConfigError
from kdflow.registry import nearest

GIB = 2**30


@dataclass(frozen=True)
class Rates:
    """One device (a GPU, or all cores of a CPU) and what joins it to others.

    Attributes:
        source: where the numbers come from.
        matmul_flops: of matrix products in the compute dtype, a second.
        attention_flops: of causal attention, forward and backward, the half below the diagonal counted.
        operator_bytes: read and written by a layer's eager operators between its products, forward and backward.
        memory_bytes: read and written by its memory, a second.
        loss_logits: that the rows of the loss take, a second: both logits to terms and gradient.
        link_bytes: of hidden states from a teacher beside the student, a second.
        node_bytes: that a device sends to those of its node, a second, while it receives as many.
        network_bytes: the same to other nodes.
        capacity_bytes: of its memory.
        process_bytes: that each process takes before any model: libraries, a context.
        shared: teacher and student compute on the one device.
    """

    name: str
    source: str
    matmul_flops: float
    attention_flops: float
    operator_bytes: float
    memory_bytes: float
    loss_logits: float
    link_bytes: float
    node_bytes: float
    network_bytes: float
    capacity_bytes: float
    process_bytes: float
    shared: bool = False


# Of an H100's stated peaks: 706-751 of 989 TFLOP/s in the loss's GEMMs (bench/results/gpu-h100-loss), 3.0 of
# 3.35 TB/s in a copy (docs/design/architecture.md), 47.4 of 64 GB/s over PCIe (bench/results/gpu-h100-ring-quick).
# FlashAttention-2, which SDPA uses, reaches 35% of an H100's peak (arXiv 2407.08608).
# Collectives have not been measured: theirs is an assumption, and so is that eager operators are as fast as copies.
ATTAINED = {
    "matmul_flops": 0.73,
    "attention_flops": 0.35,
    "memory_bytes": 0.9,
    "link_bytes": 0.74,
    "node_bytes": 0.75,
    "network_bytes": 0.75,
}
# The row kernel of the loss moves ten bytes a logit: both read twice and the gradient written, in bfloat16.
LOGIT_BYTES = 10


def _gpu(name: str, tflops: float, tbytes: float, gib: float, pcie: float, nvlink: float, sheet: str) -> Rates:
    """By a data sheet: dense bf16 TFLOP/s, memory TB/s and GiB, PCIe and NVLink GB/s in one direction."""
    memory = ATTAINED["memory_bytes"] * tbytes * 1e12
    return Rates(
        name=name,
        source=f"{sheet}, times what an H100 was measured to reach of its own",
        matmul_flops=ATTAINED["matmul_flops"] * tflops * 1e12,
        attention_flops=ATTAINED["attention_flops"] * tflops * 1e12,
        operator_bytes=memory,
        memory_bytes=memory,
        loss_logits=memory / LOGIT_BYTES,
        link_bytes=ATTAINED["link_bytes"] * pcie * 1e9,
        node_bytes=ATTAINED["node_bytes"] * nvlink * 1e9,
        # One 400 Gbit/s adapter for each GPU, as in the makers' reference nodes; 200 for A100.
        network_bytes=ATTAINED["network_bytes"] * (25e9 if name == "A100" else 50e9),
        capacity_bytes=gib * GIB,
        process_bytes=1.5 * GIB,
    )


GPUS: Mapping[str, Rates] = {
    rates.name: rates
    for rates in (
        _gpu("A100", 312, 2.039, 80, 32, 300, "NVIDIA A100 80GB SXM data sheet (2021)"),
        _gpu("H100", 989, 3.35, 80, 64, 450, "NVIDIA H100 SXM data sheet (2023)"),
        _gpu("H200", 989, 4.8, 141, 64, 450, "NVIDIA H200 SXM data sheet (2024)"),
        _gpu("B200", 2250, 7.7, 180, 64, 900, "NVIDIA HGX B200 data sheet (2024), an eighth of it"),
    )
}


def load_rates(source: str) -> Rates:
    """A GPU of the table by its name, a result file with `bench ceilings` in it, or a JSON file of Rates.

    Raises:
        ConfigError: no such GPU or file, or a file without what is needed.
    """
    known = {name.lower(): rates for name, rates in GPUS.items()}
    if source.lower() in known:
        return known[source.lower()]
    path = Path(source).expanduser()
    if not path.is_file():
        raise ConfigError(
            f"--rates: expected a file or one of {', '.join(GPUS)}, got {source}{nearest(source, list(GPUS))}; "
            "`python -m bench ceilings --out FILE` measures this machine"
        )
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError:
        records = [_whole_file(path)]
    match records:
        case [{"kind": "environment"} as environment, *rows]:
            try:
                return _measured(path, environment, rows)
            except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"--rates: {path}: expected rows of `python -m bench ceilings`, got others "
                    f"({type(error).__name__}: {error}); run it with --out FILE and give that file"
                ) from None
        case [values]:
            return _stated(path, values)
        case _:
            return _stated(path, {})


def _whole_file(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"--rates: {path}: not JSON: {error}") from None


def _stated(path: Path, values: Any) -> Rates:
    """A JSON object with Rates' fields; `like` names a GPU whose numbers stand for those that are not given."""
    names = [f.name for f in fields(Rates)]
    base: dict[str, Any] = {"name": path.stem, "source": str(path), "shared": False}
    if not isinstance(values, dict):
        raise ConfigError(f"--rates: {path}: expected a JSON object, got {type(values).__name__}")
    if like := values.get("like"):
        if like not in GPUS:
            raise ConfigError(f"--rates: {path}: like: expected one of {', '.join(GPUS)}, got {like}")
        base = {**asdict(GPUS[like]), **base}
    unknown = set(values) - set(names) - {"like"}
    base.update({name: value for name, value in values.items() if name in names})
    missing = set(names) - set(base)
    if unknown or missing:
        raise ConfigError(
            f"--rates: {path}: unknown {sorted(unknown)}, missing {sorted(missing)}; expected {', '.join(names)}, "
            'or `"like": "H100"` for those not given'
        )
    for name in set(names) - {"name", "source", "shared"}:
        if type(base[name]) not in (int, float) or not base[name] > 0:
            raise ConfigError(f"--rates: {path}: {name}: expected a number above 0, got {base[name]!r}")
    if not isinstance(base["shared"], bool):
        raise ConfigError(f"--rates: {path}: shared: expected true or false, got {base['shared']!r}")
    return Rates(**base)


def _measured(path: Path, environment: Mapping[str, Any], rows: list[dict[str, Any]]) -> Rates:
    """Rates of `bench ceilings`; on a GPU, what it does not measure is the table's."""
    best: dict[str, float] = {}  # the fastest floor of each kind
    for row in rows:
        rate = row["params"].get("rate") if row["suite"] == "ceilings" else None
        if rate and row["median_s"]:
            per_work = row["params"]["rate_per_work"]
            best[rate] = max(best.get(rate, 0.0), per_work * row["work"] / row["median_s"])
    needed = {"matmul_flops", "attention_flops", "operator_bytes", "memory_bytes", "loss_logits"}
    if missing := needed - set(best):
        raise ConfigError(
            f"--rates: {path}: expected rows of `python -m bench ceilings`, found none for "
            f"{', '.join(sorted(missing))}; run it with --out FILE and give that file"
        )
    gpu = environment.get("gpu")
    if gpu:
        table = next((rates for name, rates in GPUS.items() if name in gpu["name"]), GPUS["H100"])
        gib = float(gpu["memory.total"].split()[0]) / 1024
        return replace(
            table,
            **best,
            name=gpu["name"],
            source=f"{path.name}; the rest: {table.source}",
            capacity_bytes=gib * GIB,
        )
    return Rates(
        **best,
        name=environment["cpu"]["model"],
        source=path.name,
        link_bytes=best["memory_bytes"] / 2,
        node_bytes=best["memory_bytes"] / 2,
        network_bytes=best["memory_bytes"] / 2,
        capacity_bytes=environment["cpu"]["memory_gib"] * GIB,
        process_bytes=CPU_PROCESS_BYTES,
        shared=True,
    )


# Private memory of a process that has imported torch, transformers and kdflow, and nothing else.
CPU_PROCESS_BYTES = 300 * 2**20
