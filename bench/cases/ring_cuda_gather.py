"""Packing a batch's loss rows into a slot: the device ring lets ``torch.index_select`` write them there (``out=``).

Beside it a copy of as many bytes, the same rows gathered into a tensor that is copied then, and a kernel made for it,
one row a program. Were the last faster by much, the ring would need such a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.model import Trial

Params = Mapping[str, Any]


class _Job:
    """``num_rows`` of twice as many rows, about every second one, and the slots that they go into in turn."""

    def __init__(self, params: Params):
        num_rows, hidden_size, device = params["num_rows"], params["hidden_size"], params["device"]
        torch.manual_seed(0)
        self.hidden = torch.randn(2 * num_rows, hidden_size, device=device).to(torch.bfloat16)
        self.rows = torch.randperm(2 * num_rows)[:num_rows].sort().values.to(device)
        self.slots = [self.hidden.new_empty(num_rows, hidden_size) for _ in range(params["num_slots"])]
        self._num_messages = params["num_messages"]

    def trial(self, pack: Callable[[torch.Tensor], object]) -> Trial:
        def step() -> None:
            for number in range(self._num_messages):
                pack(self.slots[number % len(self.slots)])

        return Trial(step, on_stream=True)

    def checked(self, pack: Callable[[torch.Tensor], object]) -> Trial:
        def check() -> dict[str, float]:
            self.slots[0].zero_()
            pack(self.slots[0])
            assert torch.equal(self.slots[0], self.hidden[self.rows]), "other rows than were asked for"
            return {"sum": float(self.slots[0].double().abs().sum())}

        trial = self.trial(pack)
        trial.check = check
        return trial


def copy(params: Params) -> Trial:
    job = _Job(params)
    return job.trial(lambda slot: slot.copy_(job.hidden[: len(slot)]))


def index_select(params: Params) -> Trial:
    job = _Job(params)
    return job.checked(lambda slot: torch.index_select(job.hidden, 0, job.rows, out=slot))


def gather_then_copy(params: Params) -> Trial:
    job = _Job(params)
    return job.checked(lambda slot: slot.copy_(job.hidden[job.rows]))


def kernel(params: Params) -> Trial:
    from bench.cases.ring_cuda_kernel import gather_rows

    job = _Job(params)
    return job.checked(lambda slot: gather_rows(job.hidden, job.rows, slot))
