from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from kdflow.errors import PeerDied, RingCorrupt, SlotAborted, TransportError
from kdflow.transport import (
    HiddenRing,
    HiddenStatesClient,
    HiddenStatesServer,
    PrefillRequest,
    RequestRing,
    request_bytes,
)
from kdflow.types import Microbatch

HIDDEN = 8


def make_microbatch(seed: int, num_rows: int = 3) -> Microbatch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 99, 12).astype(np.int32)
    rows = np.sort(rng.choice(11, num_rows, replace=False)).astype(np.int32)
    return Microbatch(ids, (5, 7), rows, (seed,))


def same(a: Microbatch, b: Microbatch) -> bool:
    return (
        np.array_equal(a.input_ids, b.input_ids)
        and a.sequence_lengths == b.sequence_lengths
        and np.array_equal(a.loss_rows, b.loss_rows)
    )


@pytest.mark.parametrize("num_rows", [0, 1, 11])
def test_request_round_trip(num_rows: int) -> None:
    request = PrefillRequest(3, 1 << 40, make_microbatch(1, num_rows))
    payload = request.encode()
    assert len(payload) <= request_bytes(12)
    read = PrefillRequest.decode(payload)
    assert (read.rank, read.ticket) == (3, 1 << 40)
    assert same(read.microbatch, request.microbatch)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: p[:10],
        lambda p: b"XXXX" + p[4:],
        lambda p: p + b"\0\0\0\0",
        lambda p: p[:-4] + np.int32(12).tobytes(),  # a row outside the tokens
        lambda p: p[:28] + p[28 : 28 + 48] + np.array([5, 8], np.int32).tobytes() + p[28 + 56 :],
    ],
)
def test_spoilt_requests_are_refused(spoil) -> None:
    with pytest.raises(RingCorrupt):
        PrefillRequest.decode(spoil(PrefillRequest(0, 0, make_microbatch(1)).encode()))


class Channel:
    """Both ends in one process, the teacher's in a thread; rows are a function of the tokens."""

    def __init__(self, num_slots: int, prefill) -> None:
        self._requests = RequestRing.create(name="requests", num_slots=8, slot_bytes=request_bytes(64))
        self._hidden = HiddenRing.create(name="hidden", num_slots=num_slots, slot_bytes=64 * HIDDEN * 4)
        server = HiddenStatesServer(
            RequestRing.attach(self._requests.handle, role="consumer"),
            {0: HiddenRing.attach(self._hidden.handle, role="producer")},
            timeout_s=10.0,
        )
        self.error: BaseException | None = None

        def serve() -> None:
            try:
                server.serve(HIDDEN, torch.float32, prefill)
            except BaseException as error:
                self.error = error

        threading.Thread(target=serve, daemon=True).start()
        self.sender = RequestRing.attach(self._requests.handle, role="producer")
        self.client = HiddenStatesClient(
            {"": self.sender},
            HiddenRing.attach(self._hidden.handle, role="consumer"),
            rank=0,
            timeout_s=10.0,
        )


def expected(microbatch: Microbatch) -> torch.Tensor:
    tokens = torch.from_numpy(microbatch.input_ids[microbatch.loss_rows]).float()
    return tokens[:, None] + torch.arange(HIDDEN)


def test_rows_come_in_order_and_the_teacher_runs_ahead() -> None:
    served: list[int] = []

    def prefill(microbatch: Microbatch, out: torch.Tensor) -> float:
        served.append(len(out))
        out.copy_(expected(microbatch))
        return 0.25

    channel = Channel(4, prefill)
    microbatches = [make_microbatch(seed, num_rows=seed % 4) for seed in range(11)]
    asked: list[int] = []

    def asking() -> Iterator[Microbatch]:
        for number, microbatch in enumerate(microbatches):
            asked.append(number)
            yield microbatch

    for number, pending in enumerate(channel.client.prefetch(asking())):
        with pending:
            assert pending.microbatch is microbatches[number]
            assert torch.equal(pending.tensor(), expected(microbatches[number]))
            assert pending.prefill_s == pytest.approx(0.25)
            assert asked[-1] == min(number + 3, 10)
            if number % 2:
                pending.release()
                assert asked[-1] == min(number + 4, 10), "a slot is free, and nobody was asked"
                assert pending.prefill_s == pytest.approx(0.25)
        if number == 0:
            deadline = time.monotonic() + 10
            while len(served) < 4 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert len(served) >= 4
    assert channel.error is None


def test_failing_prefill_reaches_the_student() -> None:
    def prefill(microbatch: Microbatch, out: torch.Tensor) -> float:
        raise ValueError("no such token 99")

    channel = Channel(2, prefill)
    (pending,) = channel.client.prefetch([make_microbatch(0)])
    with pytest.raises(SlotAborted, match="no such token 99"), pending:
        pending.tensor()


def write_expected(microbatch: Microbatch, out: torch.Tensor) -> float:
    out.copy_(expected(microbatch))
    return 0.0


def read_all(channel: Channel, seeds: range) -> None:
    for seed, pending in zip(seeds, channel.client.prefetch(make_microbatch(seed) for seed in seeds), strict=True):
        with pending:
            assert torch.equal(pending.tensor(), expected(make_microbatch(seed)))


def test_a_request_that_comes_twice_is_passed_over() -> None:
    channel = Channel(2, write_expected)
    read_all(channel, range(1))
    channel.sender.send(PrefillRequest(0, 0, make_microbatch(0)).encode())
    read_all(channel, range(1, 6))
    assert channel.error is None


def test_a_request_that_nobody_took_is_not_sent_again() -> None:
    requests = RequestRing.create(name="requests", num_slots=8, slot_bytes=request_bytes(64))
    hidden = HiddenRing.create(name="hidden", num_slots=2, slot_bytes=64 * HIDDEN * 4)
    HiddenRing.attach(hidden.handle, role="producer").close()
    client = HiddenStatesClient(
        {"": RequestRing.attach(requests.handle, role="producer")},
        HiddenRing.attach(hidden.handle, role="consumer"),
        rank=0,
        timeout_s=10.0,
        max_resends=2,
    )
    (pending,) = client.ask([make_microbatch(0)])
    with pytest.raises(PeerDied, match="no producer is left"):
        pending.tensor()
    assert requests.stats().producers.records == 1


def test_a_request_that_cannot_be_sent_takes_no_ticket() -> None:
    channel = Channel(2, write_expected)
    large = Microbatch(np.zeros(400, np.int32), (400,), np.arange(3, dtype=np.int32), (0,))
    with pytest.raises(ValueError, match="expected at most"):
        channel.client.ask([large])
    read_all(channel, range(5))


def test_more_than_there_are_slots_cannot_be_asked_for_at_once() -> None:
    channel = Channel(2, write_expected)
    with pytest.raises(ValueError, match="expected at most 2, the slots of the ring, got 3"):
        channel.client.ask([make_microbatch(seed) for seed in range(3)])


def test_a_block_that_is_left_early_blocks_no_slot() -> None:
    channel = Channel(2, write_expected)
    for seed, pending in enumerate(channel.client.prefetch(make_microbatch(seed) for seed in range(6))):
        if seed == 1:
            with pytest.raises(ZeroDivisionError), pending:
                raise ZeroDivisionError
        else:
            with pending:
                assert torch.equal(pending.tensor(), expected(make_microbatch(seed)))
    assert channel.error is None


def test_a_loop_that_is_left_early_blocks_no_slot() -> None:
    channel = Channel(2, write_expected)
    pending = next(channel.client.prefetch(make_microbatch(seed) for seed in range(6)))
    read_all(channel, range(10, 14))
    with pytest.raises(TransportError, match="was given back"):
        pending.tensor()
    assert channel.error is None


def test_a_student_that_keeps_its_slots_holds_nobody_else_up() -> None:
    requests = RequestRing.create(name="requests", num_slots=8, slot_bytes=request_bytes(64))
    sender = RequestRing.attach(requests.handle, role="producer")
    hidden = [HiddenRing.create(name=f"hidden[{rank}]", num_slots=1, slot_bytes=64 * HIDDEN * 4) for rank in range(2)]
    students = [HiddenRing.attach(ring.handle, role="consumer") for ring in hidden]
    server = HiddenStatesServer(
        RequestRing.attach(requests.handle, role="consumer"),
        {rank: HiddenRing.attach(ring.handle, role="producer") for rank, ring in enumerate(hidden)},
        timeout_s=0.1,
    )
    sender.send(PrefillRequest(0, 1, make_microbatch(0)).encode())  # its slot is not free before 0 was read
    sender.send(PrefillRequest(1, 0, make_microbatch(1)).encode())
    with pytest.warns(RuntimeWarning, match="request of rank 0 dropped: .*ticket 1 timed out"):
        server.serve(HIDDEN, torch.float32, write_expected, limit=1)
    with students[1].receive(0, timeout_s=10) as slot:
        assert torch.equal(slot.tensor(), expected(make_microbatch(1)))


def test_each_teacher_has_its_requests_and_one_that_leaves_is_missed() -> None:
    """All answer in one data ring, where the other one keeps its seat."""
    rings = {
        name: RequestRing.create(name=name, num_slots=8, slot_bytes=request_bytes(64)) for name in ("code", "math")
    }
    hidden = HiddenRing.create(name="hidden", num_slots=4, slot_bytes=64 * HIDDEN * 4)
    consumers = {name: RequestRing.attach(ring.handle, role="consumer") for name, ring in rings.items()}
    seat = HiddenRing.attach(hidden.handle, role="producer")
    client = HiddenStatesClient(
        {name: RequestRing.attach(ring.handle, role="producer") for name, ring in rings.items()},
        HiddenRing.attach(hidden.handle, role="consumer"),
        rank=0,
        timeout_s=60.0,
        max_resends=1,
    )
    names = ["math", "code", "math"]
    pending = client.prefetch([replace(make_microbatch(i), teacher_name=name) for i, name in enumerate(names)])
    first = next(pending)
    asked = {name: [] for name in rings}
    for name, ring in consumers.items():
        while (payload := ring.try_receive()) is not None:
            asked[name].append(PrefillRequest.decode(payload).ticket)
    assert asked == {"code": [1], "math": [0, 2]}
    consumers["math"].close()
    began = time.monotonic()
    with pytest.raises(PeerDied, match="math"), first:
        first.tensor()
    assert time.monotonic() - began < 30
    seat.close()
