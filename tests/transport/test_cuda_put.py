"""Whole tensors handed over in one call, and who ends a slot, on the fake driver (tests/support/fake_cuda.cpp)."""

from __future__ import annotations

import mmap
import os
import time

import numpy as np
import pytest

from kdflow.errors import RingCorrupt, RingTimeout, SlotAborted, TransportError
from support.fake_cuda import (
    NUM_SLOTS,
    NUMBERS,
    PLACEMENTS,
    FakeArray,
    FakeStream,
    fail,
    on_fake_driver,
    received,
    ring_pair,
)

NOT_READY = 600
FIRST_SLOT = 8832  # in the segment: its control word


@on_fake_driver
def test_records_are_as_they_were_put() -> None:
    for placement in PLACEMENTS:
        for devices in ((0, 0), (1, 0)):
            with ring_pair(placement, devices=devices) as (producer, consumer):
                for ticket in range(3 * NUM_SLOTS):
                    source = FakeArray(NUMBERS + ticket, producer.device)
                    producer.put(source, ticket, microbatch_id=7 * ticket, tag=-ticket)
                    with consumer.receive(ticket, timeout_s=20) as slot:
                        assert (slot.microbatch_id, slot.tag, slot.shape) == (7 * ticket, -ticket, (4, 6))
                        target = FakeArray(np.zeros_like(NUMBERS), consumer.device)
                        slot.copy_to(target)
                    consumer.synchronize()
                    assert np.array_equal(target.numpy, NUMBERS + ticket), (placement, devices)


@on_fake_driver
def test_free_running_records_and_empty_ones() -> None:
    with ring_pair("device") as (producer, consumer):
        producer.put(FakeArray(NUMBERS))
        producer.put(FakeArray(np.zeros((0, 8), np.float32)))
        assert np.array_equal(received(consumer, 0), NUMBERS)
        with consumer.receive(timeout_s=20) as slot:
            assert slot.shape == (0, 8)


@on_fake_driver
def test_put_returns_at_once_and_publishes_after_the_copy() -> None:
    for placement in PLACEMENTS:
        with ring_pair(placement) as (producer, consumer):
            stream = FakeStream()
            stream.hold()
            for ticket in range(NUM_SLOTS):
                producer.put(FakeArray(NUMBERS + ticket), ticket, stream=stream)
            time.sleep(0.05)  # time enough for a ring that does not wait
            assert (consumer.stats().writing, consumer.stats().depth) == (NUM_SLOTS, 0)
            with pytest.raises(RingTimeout):
                producer.put(FakeArray(NUMBERS), NUM_SLOTS, timeout_s=0.05)
            before = time.monotonic_ns()
            stream.let_go()
            for ticket in range(NUM_SLOTS):
                with consumer.receive(ticket, timeout_s=20) as slot:
                    assert before < slot.committed_ns < time.monotonic_ns()
                    target = FakeArray(np.zeros_like(NUMBERS))
                    slot.copy_to(target)
                consumer.synchronize()
                assert np.array_equal(target.numpy, NUMBERS + ticket)


@on_fake_driver
def test_what_cannot_be_sent_leaves_the_ticket_as_it_was() -> None:
    with ring_pair("device") as (producer, consumer):
        host, strided = FakeArray(NUMBERS), FakeArray(NUMBERS)
        host.__cuda_array_interface__["data"] = (NUMBERS.ctypes.data, False)
        strided.__cuda_array_interface__["strides"] = (4, 16)
        for array, stream, error, words in (
            (FakeArray(NUMBERS, 1), None, TransportError, "expected memory of cuda:0, got memory of cuda:1"),
            (host, None, TransportError, "got an address that is no device's"),
            (strided, None, ValueError, "expected a contiguous one in C order"),
            (NUMBERS, None, TypeError, "got ndarray"),
            (FakeArray(np.zeros(2048, np.float32)), None, ValueError, r"put of ticket 0: .* \(slot_bytes\), got 8192"),
            (FakeArray(NUMBERS), FakeStream(1), TransportError, "stream: expected one of cuda:0"),
            (FakeArray(NUMBERS), "stream 1", TypeError, "stream: expected a torch or cupy stream"),
        ):
            with pytest.raises(error, match=words):
                producer.put(array, 0, stream=stream)
            assert consumer.is_free(0)
        producer.put(FakeArray(NUMBERS), 0)
        assert np.array_equal(received(consumer, 0), NUMBERS)
        with pytest.raises(TransportError, match="only a producer may do this"):
            consumer.put(FakeArray(NUMBERS), 1)
    with pytest.raises(TransportError, match="this ring is closed"):
        producer.put(FakeArray(NUMBERS), 1)


@on_fake_driver
def test_failed_calls_give_the_slot_up() -> None:
    with ring_pair("device") as (producer, consumer):
        for call, words in (("cuMemcpyAsync", "cuMemcpyAsync"), ("cuEventRecord", "the slot was dropped")):
            fail(call, 1)
            fail("cuStreamQuery", NOT_READY)
            with pytest.raises(TransportError, match=f"{call}: CUDA_ERROR_INVALID_VALUE"):
                producer.put(FakeArray(NUMBERS), 0)
            fail("cuStreamQuery", 0)
            with pytest.raises(SlotAborted, match=words):
                consumer.receive(0, timeout_s=20)
            fail(call, 0)
            consumer.reclaim(0)
        producer.put(FakeArray(NUMBERS), 0)
        assert np.array_equal(received(consumer, 0), NUMBERS)


@on_fake_driver
def test_slot_that_nobody_looked_at_waits_for_no_stream() -> None:
    """What cannot have been enqueued on it need not be waited for; behind an address something may have been."""
    with ring_pair("device") as (producer, consumer):
        stream = FakeStream()
        stream.hold()
        for ticket in range(NUM_SLOTS):
            producer.put(FakeArray(NUMBERS), ticket)
        with consumer.receive(0, timeout_s=20, stream=stream) as slot:
            slot.copy_to(FakeArray(NUMBERS))
        consumer.receive(1, timeout_s=20, stream=stream).release()
        assert not consumer.is_free(NUM_SLOTS)
        assert consumer.is_free(NUM_SLOTS + 1)
        producer.put(FakeArray(NUMBERS), NUM_SLOTS + 1)
        with consumer.receive(NUM_SLOTS + 1, timeout_s=20, stream=stream) as slot:
            assert slot.array().__cuda_array_interface__["shape"] == (4, 6)
        assert not consumer.is_free(2 * NUM_SLOTS + 1)
        stream.let_go()
        consumer.synchronize()
        assert consumer.is_free(NUM_SLOTS)
        assert consumer.is_free(2 * NUM_SLOTS + 1)


@on_fake_driver
def test_slot_granted_twice_is_told() -> None:
    with ring_pair("device") as (producer, consumer):
        stream = FakeStream()
        stream.hold()
        producer.put(FakeArray(NUMBERS), 0, stream=stream)
        with mmap.mmap(producer.fileno(), os.fstat(producer.fileno()).st_size) as segment:
            assert segment[FIRST_SLOT : FIRST_SLOT + 8] != bytes(8)
            segment[FIRST_SLOT : FIRST_SLOT + 8] = bytes(8)  # free, for ticket 0
        with pytest.raises(RingCorrupt, match="a slot was granted while work on it is still running"):
            producer.put(FakeArray(NUMBERS), 0, stream=stream)
        stream.let_go()
        with pytest.raises(SlotAborted, match="the slot was dropped"):
            consumer.receive(0, timeout_s=20)
