"""The CUDA ring across processes that die, on the fake driver (tests/support/fake_cuda.cpp)."""

from __future__ import annotations

import time

import numpy as np
import pytest

from kdflow.errors import PeerDied, TransportError
from kdflow.transport import CudaRing, HiddenStatesServer, RequestRing, request_bytes
from kdflow.transport.channel import PrefillRequest
from kdflow.types import Microbatch
from support.fake_cuda import NUMBERS, PLACEMENTS, FakeArray, FakeStream, live, on_fake_driver, received
from support.processes import Spawned, say, until


def create(placement: str) -> CudaRing:
    return CudaRing.create(name="hidden[0]", num_slots=2, slot_bytes=4096, placement=placement)


def produce(handle: str, tickets: list[int], device: int) -> None:
    with CudaRing.attach(handle, role="producer", device=device) as producer:
        for ticket in tickets:
            source = FakeArray(NUMBERS + ticket, device)
            with producer.reserve(ticket, timeout_s=30) as slot:
                slot.copy_from(source)
        producer.synchronize()
    assert live()["opened"] == live()["registered"] == live()["events"] == live()["contexts"] == 0


@on_fake_driver
def test_producers_on_both_devices() -> None:
    for placement in PLACEMENTS:
        with create(placement) as made:
            children = [Spawned(produce, made.handle, list(range(i, 12, 2)), i) for i in range(2)]
            with CudaRing.attach(made.handle, role="consumer", device=1) as consumer:
                for ticket in range(12):
                    assert np.array_equal(received(consumer, ticket), NUMBERS + ticket)
                assert [child.join() for child in children] == [0, 0]


def produce_and_hang(handle: str) -> None:
    """Committed, as Python sees it, while the copy never runs."""
    producer = CudaRing.attach(handle, role="producer")
    stream = FakeStream()
    stream.hold()
    with producer.reserve(0, timeout_s=30, stream=stream) as slot:
        slot.copy_from(FakeArray(NUMBERS))
    say("committed")
    time.sleep(60)


@on_fake_driver
def test_writer_killed_between_copy_and_publish() -> None:
    for placement in PLACEMENTS:
        with create(placement) as made, CudaRing.attach(made.handle, role="consumer") as consumer:
            child = Spawned(produce_and_hang, made.handle)
            assert child.line() == "committed"
            assert consumer.stats().depth == 0
            child.kill()
            with pytest.raises(PeerDied, match=rf"receive of ticket 0: producer pid {child.pid} died while writing it"):
                consumer.receive(0, timeout_s=30)
            consumer.reclaim(0)
            other = Spawned(produce, made.handle, [0, 1], 0)
            until(lambda: consumer.stats().producers.attached == 2)  # it may have gone again
            assert np.array_equal(received(consumer, 0), NUMBERS)
            assert np.array_equal(received(consumer, 1), NUMBERS + 1)
            assert other.join() == 0


def own_and_hang(handle: str) -> None:
    consumer = CudaRing.attach(handle, role="consumer")
    stream = FakeStream()
    slot = consumer.receive(0, timeout_s=30, stream=stream)
    stream.hold()
    slot.copy_to(FakeArray(NUMBERS))
    slot.release()
    say("reading")
    time.sleep(60)


@on_fake_driver
def test_owner_killed() -> None:
    for placement in PLACEMENTS:
        with create(placement) as made:
            child = Spawned(own_and_hang, made.handle)
            producer = CudaRing.attach(made.handle, role="producer")
            source = FakeArray(NUMBERS)
            for ticket in range(2):
                with producer.reserve(ticket, timeout_s=30) as slot:
                    slot.copy_from(source)
            assert child.line() == "reading"
            before = live()
            assert before["opened"] == (placement == "device")
            held = None
            child.kill()
            with pytest.raises(PeerDied):
                held = producer.reserve(2, timeout_s=30)
            assert held is None
            producer.close()
            source.free()
            assert live() == dict.fromkeys(before, 0)
            if placement == "device":
                with pytest.raises(TransportError, match="its device memory went with the consumer that owned it"):
                    CudaRing.attach(made.handle, role="consumer")
                continue
            # Host memory stays: what the dead one had not finished reading is delivered again.
            with CudaRing.attach(made.handle, role="consumer") as consumer:
                for ticket in range(2):
                    assert np.array_equal(received(consumer, ticket), NUMBERS)


@on_fake_driver
def test_owner_killed_over_a_slot_that_is_being_written() -> None:
    with create("device") as made:
        child = Spawned(own_and_hang, made.handle)
        producer = CudaRing.attach(made.handle, role="producer")
        source, stream = FakeArray(NUMBERS), FakeStream()
        with producer.reserve(0, timeout_s=30) as slot:
            slot.copy_from(source)
        assert child.line() == "reading"
        stream.hold()
        with producer.reserve(1, stream=stream) as slot:
            slot.copy_from(source)
        child.kill()
        stream.let_go()  # the copy runs into memory that is still mapped, for nobody
        producer.synchronize()
        with pytest.raises(PeerDied, match="the consumer that owns the device memory died; close this end too"):
            producer.reserve(2, timeout_s=30)
        producer.close()
        assert live()["opened"] == 0


def produce_until_told(handle: str) -> None:
    producer = CudaRing.attach(handle, role="producer")
    source = FakeArray(NUMBERS)
    try:
        for ticket in range(1_000_000):
            with producer.reserve(ticket, timeout_s=30) as slot:
                slot.copy_from(source)
            if ticket == 0:
                say("producing")
    except PeerDied:
        producer.close()
        assert live()["opened"] == 0
        say("told")


@on_fake_driver
def test_owner_frees_when_its_producers_have_left() -> None:
    with create("device") as made:
        child = Spawned(produce_until_told, made.handle)
        consumer = CudaRing.attach(made.handle, role="consumer")
        for ticket in range(20):
            with consumer.receive(ticket, timeout_s=30):
                pass
        assert child.line() == "producing"
        assert live()["allocations"] == 1
        consumer.close(grace_s=30)
        assert live()["allocations"] == 0
        assert child.line() == "told"
        assert child.join() == 0


def commit_and_end(handle: str) -> None:
    producer = CudaRing.attach(handle, role="producer")
    for ticket in range(2):
        with producer.reserve(ticket, timeout_s=30) as slot:
            slot.copy_from(FakeArray(NUMBERS + ticket))


@on_fake_driver
def test_what_was_committed_right_before_the_end_arrives() -> None:
    with create("pinned") as made, CudaRing.attach(made.handle, role="consumer") as consumer:
        assert Spawned(commit_and_end, made.handle).join() == 0
        for ticket in range(2):
            assert np.array_equal(received(consumer, ticket), NUMBERS + ticket)


def never(microbatch: Microbatch, out: object) -> float:
    raise AssertionError("nobody is left to read it")


@on_fake_driver
def test_a_teacher_that_is_asked_by_a_student_who_left_ends_as_if_it_had_not_been() -> None:
    """Its error would be told in place of the one that the student ended with."""
    import torch  # not by the children of the other tests

    microbatch = Microbatch(np.arange(5, dtype=np.int32), (5,), np.arange(4, dtype=np.int32))
    requests = RequestRing.create(name="requests", num_slots=2, slot_bytes=request_bytes(8))
    with create("device") as made, CudaRing.attach(made.handle, role="producer") as producer:
        server = HiddenStatesServer(RequestRing.attach(requests.handle, role="consumer"), {0: producer}, timeout_s=30)
        student = CudaRing.attach(made.handle, role="consumer")
        with RequestRing.attach(requests.handle, role="producer") as asks:
            asks.send(PrefillRequest(0, 0, microbatch).encode())
        with pytest.warns(ResourceWarning, match="a producer is still attached"):
            student.close(grace_s=0)
        assert server.serve(8, torch.float32, never) is False
