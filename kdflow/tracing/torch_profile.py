"""torch.profiler around some steps, with the spans as ranges in its trace."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule


class TorchProfile:
    """Writes a Chrome trace of the operators and kernels of `num_steps` steps.

    Args:
        first_step: the first one recorded, counted from 1.
    """

    def __init__(self, path: Path, *, first_step: int, num_steps: int) -> None:
        self._path = path
        self._ranges: list[record_function] = []
        # The profiler's own start is thrown away with the step before, where there is one.
        warm_up = min(1, first_step - 1)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._num_steps_left = first_step - 1 + num_steps
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=first_step - 1 - warm_up, warmup=warm_up, active=num_steps, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def begin(self, name: str, args: dict[str, int]) -> None:
        entered = record_function(name)
        entered.__enter__()
        self._ranges.append(entered)

    def end(self) -> None:
        self._ranges.pop().__exit__(None, None, None)

    def end_of_step(self) -> None:
        if self._num_steps_left:
            self._num_steps_left -= 1
            self._profile.step()
            if not self._num_steps_left:
                self._profile.stop()

    def close(self) -> None:
        """Writes what there is of a run that ended early."""
        if self._num_steps_left:
            self._num_steps_left = 0
            self._profile.stop()

    def _write(self, finished: profile) -> None:
        aside = self._path.with_suffix(".writing")
        finished.export_chrome_trace(str(aside))
        aside.rename(self._path)
