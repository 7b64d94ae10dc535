"""The CUDA ring leaves nothing behind, on the fake driver (tests/support/fake_cuda.cpp)."""

from __future__ import annotations

import os

from support.fake_cuda import NOTHING, NUMBERS, PLACEMENTS, FakeArray, live, on_fake_driver, ring_pair


@on_fake_driver
def test_ten_thousand_records_leave_nothing_behind() -> None:
    for placement in PLACEMENTS:
        with ring_pair(placement) as (producer, consumer):
            source, target = FakeArray(NUMBERS), FakeArray(NUMBERS)
            before = None
            for ticket in range(10_000):
                with producer.reserve(ticket) as slot:
                    slot.copy_from(source)
                with consumer.receive(ticket, timeout_s=20) as slot:
                    slot.copy_to(target)
                if ticket == 100:
                    before = live()
            consumer.synchronize()
            assert live() == before
            source.free()
            target.free()
        assert live() == NOTHING


@on_fake_driver
def test_a_thousand_attachments_leave_nothing_behind() -> None:
    for placement in PLACEMENTS:
        before = None
        for _ in range(1000):
            with ring_pair(placement) as (producer, consumer):
                producer.reserve(0).abort("only to open the slab")
                assert consumer.peers()["producer"] == (os.getpid(),)
            before = before or len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(os.listdir("/proc/self/task")) < 20
        assert live() == NOTHING
