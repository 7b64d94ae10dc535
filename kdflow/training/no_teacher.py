"""The source of hidden states of a run that has no teacher, or whose student computes them itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from types import TracebackType

import torch

from kdflow.types import Microbatch


class NoTeacher:
    """Gives each microbatch rows without columns, at once."""

    def prefetch(self, work: Iterator[Sequence[Microbatch]]) -> Iterator[NoRows]:
        return map(NoRows, chain.from_iterable(work))


class NoRows:
    """(N, 0), and no time spent on it."""

    prefill_s = waited_s = 0.0

    def __init__(self, microbatch: Microbatch) -> None:
        self.microbatch = microbatch

    def tensor(self) -> torch.Tensor:
        return torch.empty(self.microbatch.num_loss_tokens, 0)

    def release(self) -> None:
        pass

    def __enter__(self) -> NoRows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
