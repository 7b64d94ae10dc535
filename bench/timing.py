"""Order statistics of repeated times, and the clock of one step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence


def quantile(values: Sequence[float], fraction: float) -> float:
    """The quantile by linear interpolation between the closest ranks."""
    ordered = sorted(values)
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def time_step(step: Callable[[], Mapping[str, float] | None], *, device: str) -> dict[str, float]:
    """Run ``step`` once; its wall time under ``seconds`` unless it measured that itself."""
    _synchronize(device)
    start = time.perf_counter()
    measures = step()
    _synchronize(device)
    return {"seconds": time.perf_counter() - start, **(measures or {})}


def time_on_stream(
    step: Callable[[], Mapping[str, float] | None], *, prepare: Callable[[], object]
) -> dict[str, float]:
    """Run ``step`` twice on the current CUDA stream and time the second by events."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()
    prepare()
    start.record()
    measures = step()
    end.record()
    end.synchronize()
    return {"seconds": start.elapsed_time(end) / 1000, **(measures or {})}


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
