"""Where a step of the fused loss spends a GPU's time: its GEMMs, its own kernels, and waiting."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch

from bench.cases.loss_providers import Params, kdflow, kdflow_clusters
from bench.model import Trial, UnavailableError

GEMM_NAMES = re.compile(r"gemm|nvjet|cutlass|xmma|splitk", re.IGNORECASE)
COPY_BYTES = 2**30
NAMED_KERNELS = 5
# What a pass over the logits moves at least: both in bf16 read once, the gradient written once.
BYTES_PER_LOGIT = 6

Kernel = tuple[str, float, float]  # name, begin and end in us


def kernels(params: Params) -> Trial:
    return _profiled_trial(kdflow, params)


def kernels_in_clusters(params: Params) -> Trial:
    return _profiled_trial(kdflow_clusters, params)


def _profiled_trial(setup: Callable[[Params], Trial], params: Params) -> Trial:
    """The step of a provider; its measures are from one profiled step, in ms, and tell the row
    kernels' rate at the least they could move, beside that of a plain copy."""
    if not params["device"].startswith("cuda"):
        raise UnavailableError("the times of kernels need a GPU")
    trial = setup(params)
    assert trial.prepare is not None
    for _ in range(3):
        trial.step()
        trial.prepare()
    found = profiled(trial.step)
    trial.prepare()
    gemm = sum(end - begin for name, begin, end in found if GEMM_NAMES.search(name))
    other = sum(end - begin for name, begin, end in found if not GEMM_NAMES.search(name))
    span = max(end for *_, end in found) - min(begin for _, begin, _ in found)
    least = BYTES_PER_LOGIT * params["num_rows"] * params["vocab_size"]
    measures = {"gemm_ms": gemm / 1e3, "other_ms": other / 1e3, "idle_ms": (span - busy(found)) / 1e3}
    if other > 0:
        measures["other_gb_s"] = least / other / 1e3
        measures["other_percent_of_copy"] = 100 * least / other / 1e3 / copy_gb_s(params["device"])
    step = trial.step

    def measured() -> dict[str, float]:
        step()
        return measures

    trial.step = measured
    trial.note = summary(found)
    return trial


def profiled(step: Callable[[], object]) -> list[Kernel]:
    """Every kernel, copy and fill that one step queued."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    return [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profile.events() or ()
        if event.device_type.name == "CUDA"
    ]


def busy(found: list[Kernel]) -> float:
    """Time in which at least one kernel ran, in us."""
    total, reached = 0.0, 0.0
    for _, begin, end in sorted(found, key=lambda kernel: kernel[1]):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def copy_gb_s(device: str) -> float:
    """Bytes that a copy inside the device reads and writes, per ns."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    copies = profiled(lambda: [target.copy_(source) for _ in range(10)])
    return 10 * 2 * COPY_BYTES / sum(end - begin for _, begin, end in copies) / 1e3


def summary(found: list[Kernel]) -> str:
    """The kernels that took longest, with their share and how often they ran."""
    times: dict[str, list[float]] = defaultdict(list)
    for name, begin, end in found:
        times[name].append(end - begin)
    total = sum(map(sum, times.values()))
    longest = sorted(times, key=lambda name: -sum(times[name]))[:NAMED_KERNELS]
    return "; ".join(f"{name[:48]} {sum(times[name]) / total:.0%} in {len(times[name])}" for name in longest)
