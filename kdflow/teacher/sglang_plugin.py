"""Runs inside SGLang's scheduler: right after a forward, loss rows go from where they were computed into the ring.

SGLang loads it in every run through the entry point `sglang.srt.plugins`; it does nothing unless KDFLOW_SGLANG_CAPTURE
is set, as kdflow/teacher/sglang.py does, and touches no request but those that bring an Errand. What SGLang itself does
with hidden states, copying them to the host and making lists, is off for these.

The plugin counts: a slot is published when all its rows were written, and given up, with the reason, if that cannot be
any more. The key "kdflow" in the meta_info of a reply says that it was there at all, so one that was not loaded is
noticed at the first request.
"""

from __future__ import annotations

import base64
import functools
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from kdflow.tracing import OFF, Trace, open_shared_trace
from kdflow.transport import CudaRing, CudaWriteSlot, HiddenRing, WriteSlot, attach_hidden_ring, claim

VARIABLE = "KDFLOW_SGLANG_CAPTURE"
KEY = "kdflow"
TARGET = "sglang.srt.managers.tp_worker.TpModelWorker.forward_batch_generation"


@dataclass(frozen=True)
class Errand:
    """What a request brings: which of its rows go where. Travels as sampling_params.custom_params.

    Attributes:
        ring: handle of the data ring, or "" for one that only asks whether somebody is here.
        placement: where its slots lie.
        rank: of the student whose ring it is, -1 for a probe, of which the timeline says nothing.
        ticket: of the record.
        dtype: of the record.
        num_rows: of the whole record, which several requests share.
        first_row: where the rows of this request begin in it.
        rows: positions in the request, ascending, as base64 of int32.
        asked_ns: monotonic clock when it was sent.
    """

    ring: str
    placement: str = "host"
    rank: int = -1
    ticket: int = 0
    dtype: str = "float32"
    num_rows: int = 0
    first_row: int = 0
    rows: str = ""
    asked_ns: int = 0

    @staticmethod
    def pack(rows: np.ndarray) -> str:
        return base64.b64encode(rows.astype(np.int32).tobytes()).decode()

    def positions(self) -> np.ndarray:
        return np.frombuffer(base64.b64decode(self.rows), np.int32)

    def to_params(self) -> dict[str, Any]:
        return {KEY: asdict(self)}

    @staticmethod
    def of(request: Any) -> Errand | None:
        """The errand of an SGLang request, if it brings one."""
        params = request.sampling_params.custom_params
        return Errand(**params[KEY]) if params and KEY in params else None


class _Record:
    """A slot that is being filled; without one (it was given up, or is another's) rows are only counted."""

    def __init__(self, slot: WriteSlot | CudaWriteSlot | None, errand: Errand, hidden_size: int) -> None:
        self.slot = slot
        self.num_missing = errand.num_rows
        self.spent_ns = 0.0
        self._done: dict[int, int] = {}  # by first_row: how many rows of that request are through
        shape = (errand.num_rows, hidden_size)
        self._rows = None if slot is None else slot.tensor(shape, getattr(torch, errand.dtype))

    def write(self, errand: Errand, hidden: torch.Tensor, prefix: int, is_last: bool) -> None:
        """Takes the rows of one request that this forward computed.

        Args:
            hidden: (n, H) of the positions `prefix` to `prefix + n` of the request.
            is_last: no more of this request will come.
        """
        positions, done = errand.positions(), self._done.get(errand.first_row, 0)
        first, last = np.searchsorted(positions, (prefix, prefix + len(hidden)))
        if first > done:
            self.give_up(
                f"{first - done} rows of a request lie in a prefix of {prefix} tokens that was not computed; turn the "
                "engine's prefix cache off (disable_radix_cache)"
            )
        if is_last and last < len(positions):
            self.give_up(f"a request ended at {prefix + len(hidden)} tokens, {len(positions) - last} rows lie behind")
            last = len(positions)
        first = max(first, done)  # a request that was taken back computes rows again
        if last > first and self._rows is not None:
            index = torch.from_numpy(positions[first:last].astype(np.int64) - prefix)
            if hidden.is_cuda:
                index = index.pin_memory().to(hidden.device, non_blocking=True)
            at = errand.first_row
            self._rows[at + first : at + last].copy_(hidden.index_select(0, index))
        self._done[errand.first_row] = max(last, done)
        self.num_missing -= max(last - done, 0)

    def give_up(self, reason: str) -> None:
        if self.slot is not None:
            self._rows = None
            self.slot.abort(reason)
            self.slot = None

    def publish(self) -> None:
        if self.slot is not None:
            self._rows = None
            self.slot.tag = round(self.spent_ns)
            self.slot.commit()


class Capture:
    """The rings and open records of this process."""

    def __init__(self) -> None:
        self._rings: dict[str, HiddenRing | CudaRing] = {}
        self._open: dict[tuple[str, int], _Record] = {}
        self._last_ns = 0
        self._trace: Trace | None = None

    def trace(self, errands: Sequence[Errand | None], device: torch.device) -> Trace:
        """For a forward with these errands; opened, on the forward's stream, at the first that a student asked for."""
        if all(errand is None or errand.rank < 0 for errand in errands):
            return OFF
        if self._trace is None:
            self._trace = open_shared_trace("engine", device)
        return self._trace

    def take(
        self, requests: Sequence[tuple[int, int, Errand | None, bool]], hidden: torch.Tensor, trace: Trace
    ) -> None:
        """Writes what a forward computed.

        Args:
            requests: prefix, number of tokens, errand and whether this is the last of it, of each request in turn.
            hidden: of all of them.
        """
        # Several records are computed at one time: each gets the part of the time that its tokens are of the forward.
        now, asked = time.monotonic_ns(), min(errand.asked_ns for *_, errand, _ in requests if errand is not None)
        ns_per_token = (now - max(asked, self._last_ns)) / sum(num_tokens for _, num_tokens, *_ in requests)
        self._last_ns = now
        begin = 0
        for prefix, num_tokens, errand, is_last in requests:
            rows = hidden[begin : begin + num_tokens]
            begin += num_tokens
            if errand is None or not errand.ring:
                continue
            key, whose = (errand.ring, errand.ticket), {"rank": errand.rank, "ticket": errand.ticket}
            record = self._open.get(key)
            if record is None:
                trace.phase("wait for slot", **whose)
                slot = claim(self._ring(errand, hidden.device), errand.ticket)
                record = self._open[key] = _Record(slot, errand, hidden.shape[1])
            trace.phase("gather", **whose)
            record.spent_ns += ns_per_token * num_tokens
            record.write(errand, rows, prefix, is_last)
            if record.num_missing == 0:
                trace.phase("publish", **whose)
                self._open.pop(key).publish()
        trace.phase()

    def _ring(self, errand: Errand, device: torch.device) -> HiddenRing | CudaRing:
        # A ring whose student has left is over; its handle may come again and mean another one.
        for handle in [h for h, ring in self._rings.items() if not ring.peers()["consumer"]]:
            self._rings.pop(handle).close()
        if errand.ring not in self._rings:
            self._rings[errand.ring] = attach_hidden_ring(
                errand.ring, placement=errand.placement, role="producer", device=device
            )
        return self._rings[errand.ring]


_capture = Capture()


def around_forward(forward: Any, worker: Any, batch: Any = None, *args: Any, **kwargs: Any) -> Any:
    """Hook around TpModelWorker.forward_batch_generation."""
    if batch is None or not batch.forward_mode.is_extend() or not any(errands := [Errand.of(r) for r in batch.reqs]):
        return forward(worker, batch, *args, **kwargs)
    writes = _is_first_rank()
    trace = _capture.trace(errands, _device_of(batch)) if writes else OFF
    with trace.span("prefill", tokens=sum(batch.extend_lens), requests=len(errands)):
        result = forward(worker, batch, *args, **kwargs)
    output = result.logits_output
    if output is not None:
        hidden, output.hidden_states = output.hidden_states, None
        output.customized_info = {KEY: [None] * len(errands)}
        if writes:
            ends = [
                prefix + n >= len(request.origin_input_ids)
                for request, prefix, n in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)
            ]
            _capture.take(list(zip(batch.prefix_lens, batch.extend_lens, errands, ends, strict=True)), hidden, trace)
    trace.end_of_step()
    return result


def _device_of(batch: Any) -> torch.device:
    """With its index, which a batch does not name."""
    kind = torch.device(batch.device).type
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _is_first_rank() -> bool:
    """Of those that share the model, which all have the same hidden states."""
    # Workers and runners keep their rank in a place that changes from release to release.
    from sglang.srt.distributed.parallel_state import get_tensor_model_parallel_rank

    return get_tensor_model_parallel_rank() == 0


def register() -> None:
    """Entry point of `sglang.srt.plugins`."""
    if VARIABLE in os.environ:
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        HookRegistry.register(TARGET, around_forward, HookType.AROUND)


def run_scheduler_process(*args: Any, **kwargs: Any) -> Any:
    """SGLang's scheduler process with the hook, for releases or installations without its plugins."""
    from sglang.srt.managers import scheduler
    from sglang.srt.managers.tp_worker import TpModelWorker

    forward = TpModelWorker.forward_batch_generation

    @functools.wraps(forward)
    def hooked(self: Any, *inner: Any, **named: Any) -> Any:
        return around_forward(forward, self, *inner, **named)

    TpModelWorker.forward_batch_generation = hooked
    return scheduler.run_scheduler_process(*args, **kwargs)
