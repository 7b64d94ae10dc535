"""What a teacher is."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kdflow.config import TeacherConfig
from kdflow.registry import Registry
from kdflow.tracing import OFF, Trace
from kdflow.transport import HiddenStatesServer, RequestRing, SleepOrder, attach_hidden_ring
from kdflow.types import Microbatch


@dataclass(frozen=True)
class TeacherRings:
    """Handles of the rings that a teacher answers through.

    Attributes:
        requests: of the request ring.
        hidden: of the data rings, by rank.
        placement: where the slots of these lie.
        timeout_s: longest wait for a slot, seconds.
        longest_sample: most tokens of a sample that will be asked for.
    """

    requests: str
    hidden: tuple[str, ...]
    placement: str
    timeout_s: float
    longest_sample: int


class Teacher(Protocol):
    """Answers requests for last hidden states (after the final norm).

    Attributes:
        hidden_size: H of its last hidden states.
        dtype: of its hidden states.
        device: where it computes, with its index where that is a GPU.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def check(config: TeacherConfig, *, sleeps: bool = False) -> None:
        """What can be known to be wrong before anything is loaded.

        Raises:
            ConfigError: something is missing, or an option cannot be had.
        """
        ...

    def __init__(self, config: TeacherConfig, *, gpu: int, sleeps: bool = False) -> None:
        """Loads the model, after `check`.

        Args:
            gpu: the (first) one to take, counted round, where it runs on CUDA.
            sleeps: whether `sleep` will be called.
        """
        ...

    def hidden_rows(self, samples: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """What the student would get for these token ids: (T - 1, H) each, all rows but the last.

        They go through the engine as one batch.
        """
        ...

    def token_logprobs(self, samples: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """The engine's own log-probabilities of each token but the first, (T - 1,) each; before `attach` only."""
        ...

    def attach(self, rings: TeacherRings) -> None:
        """Joins the rings; once, before `serve`.

        Raises:
            ConfigError: it cannot take a sample as long as will be asked for.
        """
        ...

    def serve(self, *, limit: int | None, trace: Trace = OFF) -> SleepOrder | bool:
        """Answers requests until every student has left, `limit` are answered or an order to sleep comes.

        Args:
            trace: gets the phases of each request, where they follow one another.

        Returns:
            The order, when all that was taken before it is answered; or whether there is more to do: False when the
            students have left.
        """
        ...

    def sleep(self) -> None:
        """Gives its GPU's memory back, and keeps what it needs to wake as the same teacher in the host's."""
        ...

    def wake_up(self) -> None:
        """Takes the memory again."""
        ...

    def close(self) -> None:
        """Leaves the rings and ends the engine."""
        ...


class LocalTeacher(ABC):
    """A teacher that prefills one microbatch after another in its own process."""

    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    def __init__(self) -> None:
        self._rings = ExitStack()
        self._server: HiddenStatesServer | None = None

    @abstractmethod
    def prefill(self, microbatch: Microbatch, out: torch.Tensor) -> None:
        """Writes the last hidden states (after the final norm) of the loss rows.

        Args:
            out: (N, H) in `dtype`, in host memory or on `device`; written when this returns.
        """

    def hidden_rows(self, samples: Sequence[np.ndarray]) -> list[torch.Tensor]:
        ends = np.cumsum([len(s) for s in samples])
        rows = np.setdiff1d(np.arange(ends[-1], dtype=np.int32), (ends - 1).astype(np.int32))
        microbatch = Microbatch(np.concatenate(samples).astype(np.int32), tuple(len(s) for s in samples), rows)
        out = torch.empty((len(rows), self.hidden_size), dtype=self.dtype)
        self.prefill(microbatch, out)
        return list(out.split([len(s) - 1 for s in samples]))

    def attach(self, rings: TeacherRings) -> None:
        requests = self._rings.enter_context(RequestRing.attach(rings.requests, role="consumer"))
        hidden = {
            rank: self._rings.enter_context(
                attach_hidden_ring(handle, placement=rings.placement, role="producer", device=self.device)
            )
            for rank, handle in enumerate(rings.hidden)
        }
        self._server = HiddenStatesServer(requests, hidden, timeout_s=rings.timeout_s)

    def serve(self, *, limit: int | None, trace: Trace = OFF) -> SleepOrder | bool:
        assert self._server is not None, "attach first"
        return self._server.serve(self.hidden_size, self.dtype, self._timed_prefill, limit=limit, trace=trace)

    def _timed_prefill(self, microbatch: Microbatch, out: torch.Tensor) -> float:
        start = time.perf_counter()
        if len(out):
            self.prefill(microbatch, out)
        return time.perf_counter() - start

    def close(self) -> None:
        self._rings.close()


TEACHERS: Registry[type[Teacher]] = Registry(
    "teacher backend", {"hf": "kdflow.teacher.hf", "sglang": "kdflow.teacher.sglang"}
)
