"""The ring across real processes: tensors arrive, deaths are named, views end with their slot."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest
import torch

from kdflow.errors import PeerDied, RingTimeout, SlotAborted, TransportError
from kdflow.transport import HiddenRing, RequestRing

SPAWN = multiprocessing.get_context("spawn")


def produce(handle: str, num_records: int) -> None:
    with HiddenRing.attach(handle, role="producer") as ring:
        for ticket in range(num_records):
            with ring.reserve(ticket, timeout_s=20) as slot:
                slot.tensor((ticket % 3, 4), torch.bfloat16).fill_(ticket)
                slot.tag = ticket * 7


def hang_while_writing(handle: str) -> None:
    ring = HiddenRing.attach(handle, role="producer")
    slot = ring.reserve(0, timeout_s=20)
    time.sleep(60)
    slot.abort("the test should have killed this process")


def create(num_slots: int = 3) -> HiddenRing:
    return HiddenRing.create(name="test", num_slots=num_slots, slot_bytes=1024, checksum=True)


def test_records_in_order_through_few_slots() -> None:
    with create() as ring, HiddenRing.attach(ring.handle, role="consumer") as consumer:
        process = SPAWN.Process(target=produce, args=(ring.handle, 20))
        process.start()
        for ticket in range(20):
            with consumer.receive(ticket, timeout_s=30) as slot:
                rows = slot.tensor()
                assert rows.shape == (ticket % 3, 4)
                assert rows.dtype is torch.bfloat16
                assert (rows == ticket).all()
                assert slot.tag == ticket * 7
        process.join(20)
        assert process.exitcode == 0


def test_producer_killed_while_writing_and_ticket_given_again() -> None:
    with create() as ring, HiddenRing.attach(ring.handle, role="consumer") as consumer:
        process = SPAWN.Process(target=hang_while_writing, args=(ring.handle,))
        process.start()
        deadline = time.monotonic() + 30
        while ring.stats().writing == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(PeerDied) as error:
            consumer.receive(0, timeout_s=20)
        assert error.value.ticket == 0
        consumer.reclaim(0)
        assert consumer.is_free(0)
        with HiddenRing.attach(ring.handle, role="producer") as again:
            with again.reserve(0, timeout_s=5) as slot:
                slot.tensor((2,), torch.float32).fill_(1)
            with consumer.receive(0, timeout_s=5) as slot:
                assert slot.tensor().sum() == 2
        process.join(10)


def test_waits_end_and_aborts_are_told() -> None:
    with (
        create() as ring,
        HiddenRing.attach(ring.handle, role="consumer") as consumer,
        HiddenRing.attach(ring.handle, role="producer") as producer,
    ):
        with pytest.raises(RingTimeout, match="test"):
            consumer.receive(0, timeout_s=0.2)
        with pytest.raises(ValueError, match="boom"), producer.reserve(0):
            raise ValueError("boom")
        with pytest.raises(SlotAborted, match="boom"):
            consumer.receive(0, timeout_s=5)


def test_views_end_with_their_slot_and_sizes_are_checked() -> None:
    with (
        create() as ring,
        HiddenRing.attach(ring.handle, role="consumer") as consumer,
        HiddenRing.attach(ring.handle, role="producer") as producer,
    ):
        with producer.reserve(0) as slot:
            slot.tensor((1024,), torch.uint8).fill_(3)
        with pytest.raises(ValueError, match="1025"), producer.reserve(1) as slot:
            slot.tensor((1025,), torch.uint8)
        with consumer.receive(0) as slot:
            kept = slot.tensor()
        assert kept.numel() == 0
        with pytest.raises(TransportError, match="given back"):
            slot.tensor()


def test_requests_in_order() -> None:
    with (
        RequestRing.create(name="requests", num_slots=4, slot_bytes=64) as ring,
        RequestRing.attach(ring.handle, role="producer") as sender,
        RequestRing.attach(ring.handle, role="consumer") as receiver,
    ):
        for payload in (b"", b"one", b"x" * 64):
            sender.send(payload, timeout_s=5)
        assert [receiver.receive(timeout_s=5) for _ in range(3)] == [b"", b"one", b"x" * 64]
        assert receiver.try_receive() is None
