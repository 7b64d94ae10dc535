"""The CUDA ring's own logic, on a driver over host memory: order of streams, errors, misuse.

The driver can hold a stream, so that work on it does not run: what is published before its copy is done is then
published without its data every time. tests/transport/test_cuda_gpu.py has the same on a device.
"""

from __future__ import annotations

import gc
import os
import time
import warnings

import numpy as np
import pytest

from kdflow.errors import PeerDied, RingCorrupt, RingTimeout, SlotAborted, TransportError
from kdflow.transport import CudaRing, HiddenRing, RingChoice, choose_ring, cuda_available, cuda_unavailable_reason
from support.fake_cuda import (
    NOTHING,
    NUM_SLOTS,
    NUMBERS,
    PLACEMENTS,
    SLOT_BYTES,
    FakeArray,
    FakeStream,
    fail,
    live,
    look_at,
    on_fake_driver,
    received,
    ring_pair,
)
from support.processes import Spawned, until

ILLEGAL_ADDRESS, NOT_READY = 700, 600


# --- is there a device, and which ring ---


def print_reason() -> None:
    print(f"{cuda_available()}: {cuda_unavailable_reason()}", flush=True)


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({}, "True: None"),
        ({"FAKE_CUDA_DEVICES": "0"}, "False: the driver is there, but no device is visible (CUDA_VISIBLE_DEVICES?)"),
        ({"FAKE_CUDA_INIT": "100"}, "False: cuInit: CUDA_ERROR_NO_DEVICE (100), the fake's words for it"),
        ({"KDFLOW_CUDA_DRIVER": "/nowhere/libcuda.so.1"}, "False: /nowhere/libcuda.so.1: cannot open shared object"),
        ({"KDFLOW_CUDA_DRIVER": "libm.so.6"}, "False: libm.so.6 has no cuInit; update the driver"),
    ],
    ids=["there", "no device", "no driver module", "no library", "another library"],
)
def test_available_or_why_not(fake_driver: dict[str, str], env: dict[str, str], reason: str) -> None:
    child = Spawned(print_reason, env={**fake_driver, **env})
    assert child.line().startswith(reason)
    assert child.join() == 0


def print_choices() -> None:
    for producer, consumer in ((None, None), (0, 0), (0, 1), (None, 0), (0, None)):
        print(choose_ring(producer=producer, consumer=consumer).kind, end=" ")
    print(flush=True)


@pytest.mark.parametrize(
    ("env", "kinds"),
    [
        ({}, "host device device pinned pinned"),
        ({"FAKE_CUDA_PEER": "0"}, "host device pinned pinned pinned"),
        ({"FAKE_CUDA_DEVICES": "0"}, "host host host host host"),
    ],
    ids=["peers", "no peer access", "no device"],
)
def test_auto_chooses_the_shortest_way(fake_driver: dict[str, str], env: dict[str, str], kinds: str) -> None:
    child = Spawned(print_choices, env={**fake_driver, **env})
    assert child.line() == kinds
    assert child.join() == 0


@on_fake_driver
def test_choice_says_why() -> None:
    expected = RingChoice("device", "GPU 0 can write into the memory of GPU 1")
    assert choose_ring(producer=0, consumer=1) == expected
    with pytest.raises(ValueError, match=r"consumer: expected a device in 0\.\.1, got 2"):
        choose_ring(producer=0, consumer=2)
    with pytest.raises(ValueError, match="device: expected 0 to 1, got 5"):
        attach_alone(5)
    assert live() == NOTHING


def attach_alone(device: int) -> None:
    with CudaRing.create(name="alone", num_slots=1, slot_bytes=64, placement="device") as made:
        CudaRing.attach(made.handle, role="consumer", device=device)


# --- records ---


@on_fake_driver
def test_records_arrive_in_order() -> None:
    for placement in PLACEMENTS:
        for devices in ((0, 0), (1, 0)):
            with ring_pair(placement, devices=devices) as (producer, consumer):
                source = FakeArray(NUMBERS, producer.device)
                for ticket in range(3 * NUM_SLOTS):
                    with producer.reserve(ticket) as slot:
                        source.numpy[...] = NUMBERS + ticket
                        slot.copy_from(source)
                        slot.tag = ticket
                    producer.synchronize()
                    assert np.array_equal(received(consumer, ticket), NUMBERS + ticket), (placement, devices)
                source.free()


@on_fake_driver
def test_commit_returns_at_once_and_publishes_after_the_copy() -> None:
    for placement in PLACEMENTS:
        with ring_pair(placement) as (producer, consumer):
            stream = FakeStream()
            stream.hold()
            with producer.reserve(0, stream=stream) as slot:
                slot.copy_from(FakeArray(NUMBERS))
            time.sleep(0.05)  # time enough for a ring that does not wait
            assert consumer.try_receive(0) is None
            assert (consumer.stats().writing, consumer.stats().depth) == (1, 0)
            with pytest.raises(RingTimeout):
                consumer.receive(0, timeout_s=0.1)
            stream.let_go()
            assert np.array_equal(received(consumer, 0), NUMBERS)


@on_fake_driver
def test_streams_do_not_hold_each_other_up() -> None:
    with ring_pair("device") as (producer, consumer):
        slow, fast = FakeStream(), FakeStream()
        slow.hold()
        for ticket, stream in enumerate((slow, fast)):
            with producer.reserve(ticket, stream=stream) as slot:
                slot.copy_from(FakeArray(NUMBERS + ticket))
        assert np.array_equal(received(consumer, 1), NUMBERS + 1)
        assert consumer.try_receive(0) is None
        slow.let_go()
        assert np.array_equal(received(consumer, 0), NUMBERS)


@on_fake_driver
def test_slot_is_free_after_its_readers_stream() -> None:
    for placement in PLACEMENTS:
        with ring_pair(placement) as (producer, consumer):
            with producer.reserve(0) as slot:
                slot.copy_from(FakeArray(NUMBERS))
            target, stream = FakeArray(np.zeros_like(NUMBERS)), FakeStream()
            with consumer.receive(0, timeout_s=20, stream=stream) as slot:
                stream.hold()
                slot.copy_to(target)
            time.sleep(0.05)
            assert not consumer.is_free(NUM_SLOTS)
            with pytest.raises(RingTimeout):
                producer.reserve(NUM_SLOTS, timeout_s=0.1)
            stream.let_go()
            with producer.reserve(NUM_SLOTS, timeout_s=20) as slot:
                slot.copy_from(FakeArray(NUMBERS + 1))
            assert np.array_equal(target.numpy, NUMBERS)


@on_fake_driver
def test_given_up_slots_are_free_after_the_stream() -> None:
    """Else the next writer of the slot would be overwritten by what the first had enqueued."""
    with ring_pair("device") as (producer, consumer):
        stream = FakeStream()
        stream.hold()
        with pytest.raises(TypeError, match="got ndarray"):  # noqa: SIM117, PT012
            with producer.reserve(0, stream=stream) as slot:
                slot.copy_from(FakeArray(NUMBERS))
                slot.copy_from(NUMBERS)
        dropped = producer.reserve(1, stream=stream)
        dropped.copy_from(FakeArray(NUMBERS))
        del dropped
        gc.collect()
        time.sleep(0.05)
        assert consumer.stats().writing == 2
        stream.let_go()
        with pytest.raises(SlotAborted, match="TypeError: tensor: expected"):
            consumer.receive(0, timeout_s=20)
        with pytest.raises(SlotAborted, match="the slot was dropped"):
            consumer.receive(1, timeout_s=20)
        consumer.reclaim(0)
        with producer.reserve(0) as slot:
            slot.copy_from(FakeArray(NUMBERS + 5))
        assert np.array_equal(received(consumer, 0), NUMBERS + 5)


@on_fake_driver
def test_array_is_the_slot_itself() -> None:
    with ring_pair("device") as (producer, consumer):
        with producer.reserve(0) as slot:
            array = slot.array((4, 6), "float32")
            address = array.__cuda_array_interface__["data"][0]
            look_at(address, np.float32, (4, 6))[...] = NUMBERS
        with consumer.receive(0, timeout_s=20) as slot:
            interface = slot.array().__cuda_array_interface__
            assert (interface["shape"], interface["typestr"], interface["data"][0]) == ((4, 6), "<f4", address)
            assert np.array_equal(look_at(address, np.float32, (4, 6)), NUMBERS)
            assert slot.array().__dlpack_device__() == (2, 0)
        with producer.reserve(1) as slot, pytest.raises(AttributeError, match="bfloat16 has no typestr"):
            slot.array((2,), "bfloat16").__cuda_array_interface__  # noqa: B018


@on_fake_driver
def test_one_side_may_be_a_plain_host_ring() -> None:
    with HiddenRing.create(name="mixed", num_slots=2, slot_bytes=SLOT_BYTES, checksum=True) as made:
        producer = HiddenRing.attach(made.handle, role="producer")
        consumer = CudaRing.attach(made.handle, role="consumer")
        with producer.reserve(0) as slot:
            slot.buffer(8)[:] = b"8 bytes!"
        with consumer.receive(0, timeout_s=20) as slot:
            target = FakeArray(np.zeros(8, np.uint8))
            slot.copy_to(target)
        consumer.synchronize()
        assert target.numpy.tobytes() == b"8 bytes!"
        producer.close()
        consumer.close()
        back = CudaRing.attach(made.handle, role="producer")
        reader = HiddenRing.attach(made.handle, role="consumer")
        with back.reserve(1) as slot:
            slot.copy_from(target)
        with reader.receive(1, timeout_s=20) as record:
            assert bytes(record.buffer()) == b"8 bytes!"
        back.close()


@on_fake_driver
def test_ready_descriptor_tells_of_records() -> None:
    import select

    with ring_pair("device") as (producer, consumer):
        descriptor = consumer._native.ready_fd()
        while select.select([descriptor], [], [], 0.2)[0]:
            assert consumer.try_receive() is None
        with producer.reserve() as slot:
            slot.copy_from(FakeArray(NUMBERS))
        until(lambda: select.select([descriptor], [], [], 5)[0] and consumer.try_receive())


# --- errors ---


@on_fake_driver
def test_failed_work_is_told_to_both_sides() -> None:
    with ring_pair("device") as (producer, consumer):
        for call in ("cuStreamQuery", "cuEventQuery"):
            fail(call, ILLEGAL_ADDRESS)
        with producer.reserve(0) as slot:
            slot.copy_from(FakeArray(NUMBERS))
        text = r"cuEventQuery: CUDA_ERROR_ILLEGAL_ADDRESS \(700\), an illegal memory access was encountered"
        with pytest.raises(SlotAborted, match=text):
            consumer.receive(0, timeout_s=20)
        with pytest.raises(TransportError, match=rf"hidden\[0\]: ticket 0: the work on its slot failed: {text}"):
            producer.synchronize()
        for call in ("cuStreamQuery", "cuEventQuery"):
            fail(call, 0)
        producer.synchronize()


@on_fake_driver
def test_what_cannot_be_set_up_leaves_nothing_behind() -> None:
    for placement, call, role, words in (
        ("device", "cuMemAlloc_v2", "consumer", "cannot allocate 2097152 bytes on cuda:0; use fewer or smaller slots"),
        ("device", "cuIpcGetMemHandle", "consumer", "cuIpcGetMemHandle: CUDA_ERROR_OUT_OF_MEMORY"),
        ("pinned", "cuMemHostRegister_v2", "producer", "cuMemHostRegister_v2: CUDA_ERROR_OUT_OF_MEMORY"),
        ("pinned", "cuEventCreate", "producer", "cuEventCreate: CUDA_ERROR_OUT_OF_MEMORY"),
        ("pinned", "cuDevicePrimaryCtxRetain", "producer", "cuDevicePrimaryCtxRetain: CUDA_ERROR_OUT_OF_MEMORY"),
    ):
        with CudaRing.create(name="r", num_slots=2, slot_bytes=SLOT_BYTES, placement=placement) as made:
            fail(call, 2)
            with pytest.raises(TransportError, match=words):
                CudaRing.attach(made.handle, role=role)
            fail(call, 0)
            assert live() == NOTHING
            assert made.peers() == {"producer": (), "consumer": ()}
            CudaRing.attach(made.handle, role=role).close()  # and it works the next time


@on_fake_driver
def test_failed_calls_give_the_slot_up() -> None:
    with ring_pair("device") as (producer, consumer):
        source = FakeArray(NUMBERS)
        fail("cuMemcpyAsync", 1)
        with (
            pytest.raises(TransportError, match="cuMemcpyAsync: CUDA_ERROR_INVALID_VALUE"),
            producer.reserve(0) as slot,
        ):
            slot.copy_from(source)
        fail("cuMemcpyAsync", 0)
        with pytest.raises(SlotAborted, match="cuMemcpyAsync"):
            consumer.receive(0, timeout_s=20)
        fail("cuStreamQuery", NOT_READY)
        fail("cuEventRecord", 1)
        with pytest.raises(TransportError, match="cuEventRecord"), producer.reserve(1) as slot:
            slot.copy_from(source)
        del slot
        gc.collect()
        with pytest.raises(SlotAborted, match="the slot was dropped"):
            consumer.receive(1, timeout_s=20)
        fail("cuEventRecord", 0)
        fail("cuStreamQuery", 0)


# --- misuse ---


@on_fake_driver
def test_wrong_device_is_refused() -> None:
    with ring_pair("device", devices=(0, 1)) as (producer, consumer):
        with pytest.raises(TransportError, match="stream: expected one of cuda:0, got one of another context"):
            producer.reserve(0, stream=FakeStream(1))
        with producer.reserve(0) as slot:
            with pytest.raises(TransportError, match="tensor: expected memory of cuda:0, got memory of cuda:1"):
                slot.copy_from(FakeArray(NUMBERS, 1))
            host = FakeArray(NUMBERS)
            host.__cuda_array_interface__["data"] = (NUMBERS.ctypes.data, False)
            with pytest.raises(TransportError, match="got an address that is no device's"):
                slot.copy_from(host)
            with pytest.raises(ValueError, match="expected a contiguous one in C order"):
                slot.copy_from(strided())
            with pytest.raises(TypeError, match="got ndarray"):
                slot.copy_from(NUMBERS)
            with pytest.raises(ValueError, match=r"at most 4096 bytes \(slot_bytes\), got 8192"):
                slot.copy_from(FakeArray(np.zeros(2048, np.float32)))
            slot.copy_from(FakeArray(NUMBERS))
            slot.use_stream(FakeStream(1))
            with pytest.raises(TransportError, match="another context"):
                slot.commit()
            slot.use_stream(0)
        with consumer.receive(0, timeout_s=20) as slot, pytest.raises(ValueError, match="expected 96 bytes, those of"):
            slot.copy_to(FakeArray(np.zeros(3), 1))
        with pytest.raises(TypeError, match="stream: expected a torch or cupy stream"):
            producer.reserve(1, stream="stream 1")


def strided() -> FakeArray:
    array = FakeArray(NUMBERS)
    array.__cuda_array_interface__["strides"] = (4, 16)
    return array


@on_fake_driver
def test_slot_is_of_no_use_after_it_was_given_back() -> None:
    with ring_pair("device") as (producer, consumer):
        with producer.reserve(0) as written:
            kept_by_producer = written.array((4, 6), "float32")
        with consumer.receive(0, timeout_s=20) as read:
            kept = read.array()
        target = FakeArray(NUMBERS)
        for use in (
            lambda: kept.__cuda_array_interface__,
            lambda: kept_by_producer.__cuda_array_interface__,
            kept.__dlpack__,
            read.array,
            read.tensor,
        ):
            with pytest.raises(TransportError, match="ticket 0: this slot was given back"):
                use()
        for use in (lambda: read.copy_to(target), lambda: written.copy_from(target), read.release, written.commit):
            with pytest.raises(TransportError, match="given back"):
                use()
        with producer.reserve(1) as slot, pytest.raises(TransportError, match="buffer"):
            slot.buffer(8)


@on_fake_driver
def test_rings_are_attached_by_the_right_class() -> None:
    with CudaRing.create(name="device", num_slots=1, slot_bytes=64, placement="device") as made:
        with pytest.raises(ValueError, match="expected slots in host memory, got device memory; attach it as CudaRing"):
            HiddenRing.attach(made.handle, role="consumer")
        with pytest.raises(ValueError, match="device: expected 0 to 1, got 2"):
            CudaRing.attach(made.handle, role="consumer", device=2)
        assert made.stats().consumers.attached == 0  # whoever was there for a moment would count as dead
        with pytest.raises(TransportError, match="created but not attached"):
            made.reserve()
        assert made.peers() == {"producer": (), "consumer": ()}
    with pytest.raises(ValueError, match='placement: expected "device" or "pinned"'):
        CudaRing.create(name="r", num_slots=1, slot_bytes=64, placement="managed")  # type: ignore[arg-type]


@on_fake_driver
def test_close_waits_for_streams() -> None:
    with ring_pair("pinned") as (producer, consumer):
        stream = FakeStream()
        stream.hold()
        with producer.reserve(0, stream=stream) as slot:
            slot.copy_from(FakeArray(NUMBERS))
        with pytest.raises(RingTimeout, match="cannot close, work on its slots is still running"):
            producer.close(timeout_s=0.1)
        assert live()["registered"] == 2
        stream.let_go()
        producer.close()
        assert live()["registered"] == 1
        with pytest.raises(TransportError, match="this ring is closed"):
            producer.reserve(1)
        assert np.array_equal(received(consumer, 0), NUMBERS)  # closing took nothing back


@on_fake_driver
def test_slab_outlives_a_producer_that_stays() -> None:
    made = CudaRing.create(name="hidden[0]", num_slots=2, slot_bytes=64, placement="device")
    producer = CudaRing.attach(made.handle, role="producer")
    consumer = CudaRing.attach(made.handle, role="consumer")
    producer.reserve(0).abort("only to open the slab")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        consumer.close(grace_s=0.05)
    assert "a producer is still attached" in str(caught[0].message)
    with pytest.raises(PeerDied, match="has closed the ring; close this end too"):
        producer.reserve(1)
    producer.close()
    assert live()["allocations"] == 1  # until the process ends
    with pytest.raises(TransportError, match="went with the consumer that owned it; create another ring"):
        CudaRing.attach(made.handle, role="consumer")


@on_fake_driver
def test_forked_child_is_told() -> None:
    with ring_pair("device") as (producer, _consumer):
        pid = os.fork()
        if pid == 0:
            try:
                producer.reserve(0)
            except TransportError as error:
                os._exit(0 if "does not work in a forked child; start it with spawn" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        producer.reserve(0).abort("the parent goes on")


@on_fake_driver
def test_spoilt_descriptor_is_refused() -> None:
    import mmap

    for spoil in (slice(8, 16), slice(20, 24), slice(30, 40)):
        with ring_pair("device") as (producer, _consumer):
            with mmap.mmap(producer.fileno(), os.fstat(producer.fileno()).st_size) as segment:
                page = len(segment) - 4096
                segment[page + spoil.start : page + spoil.stop] = bytes(spoil.stop - spoil.start)
            with pytest.raises(RingCorrupt, match="the consumer's slab"):
                producer.reserve(0)
