"""The CUDA ring on a device: data, order of streams, misuse, leaks, and peers that die.

Every wait of a stream here is made by a kernel that spins for a known time, so that what is published or freed too
early would be seen. All processes are fresh interpreters.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from kdflow.errors import PeerDied, RingTimeout, SlotAborted, TransportError
from kdflow.transport import (
    CudaRing,
    HiddenStatesClient,
    HiddenStatesServer,
    RequestRing,
    RingChoice,
    choose_ring,
    cuda_available,
    request_bytes,
)
from kdflow.types import Microbatch
from support.processes import Spawned, say, until

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PLACEMENTS = ["device", "pinned"]
NUM_SLOTS = 4
MIB = 2**20
DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
]


def create(placement: str, *, slot_bytes: int = MIB) -> CudaRing:
    return CudaRing.create(name="hidden[0]", num_slots=NUM_SLOTS, slot_bytes=slot_bytes, placement=placement)


@contextmanager
def ring_pair(placement: str, *, slot_bytes: int = MIB) -> Iterator[tuple[CudaRing, CudaRing]]:
    with create(placement, slot_bytes=slot_bytes) as made:
        producer = CudaRing.attach(made.handle, role="producer", device="cuda")
        consumer = CudaRing.attach(made.handle, role="consumer", device=torch.device("cuda", 0))
        try:
            yield producer, consumer
        finally:
            producer.close()
            consumer.close()


def spin(milliseconds: float) -> None:
    """Keep the current stream busy: about as long, at 1 to 2 GHz."""
    torch.cuda._sleep(int(milliseconds * 2_000_000))


def numbers(value: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((128, 1024), value, dtype=dtype, device="cuda")


def test_device_is_found() -> None:
    assert cuda_available()
    assert choose_ring(producer=0, consumer=0) == RingChoice("device", "both sides use GPU 0")


# --- data ---


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_arrives_bit_for_bit(placement: str, dtype: torch.dtype) -> None:
    raw = torch.arange(3 * 5 * dtype.itemsize, dtype=torch.uint8, device="cuda") % 2
    expected = raw.view(dtype).view(3, 5)
    with ring_pair(placement) as (producer, consumer):
        with producer.reserve(0) as slot:
            slot.tensor((3, 5), dtype).copy_(expected)
        with producer.reserve(1) as slot:
            slot.copy_from(expected)
        for ticket in range(2):
            with consumer.receive(ticket) as slot:
                got = slot.tensor()
                assert (got.dtype, got.shape, got.device) == (dtype, (3, 5), torch.device("cuda", 0))
                assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (), (1,), (512, 512)])
def test_shapes_from_no_row_to_a_full_slot(placement: str, shape: tuple[int, ...]) -> None:
    with ring_pair(placement) as (producer, consumer):
        with producer.reserve(0) as slot:
            slot.tensor(shape, torch.float32).fill_(7)
        with consumer.receive(0) as slot:
            assert slot.tensor().shape == shape
            assert bool((slot.tensor() == 7).all())


def test_rows_are_gathered_into_the_slot() -> None:
    hidden = torch.randn(100, 64, device="cuda", dtype=torch.bfloat16)
    rows = torch.tensor([3, 5, 99], device="cuda")
    with ring_pair("device") as (producer, consumer):
        with producer.reserve(0) as slot:
            torch.index_select(hidden, 0, rows, out=slot.tensor((3, 64), torch.bfloat16))
        with consumer.receive(0) as slot:
            assert torch.equal(slot.tensor(), hidden[rows])


def test_device_ring_copies_nothing() -> None:
    with ring_pair("device") as (producer, consumer):
        with producer.reserve(0) as slot:
            address = slot.tensor((4,), torch.int32).fill_(1).data_ptr()
        with consumer.receive(0) as slot:
            first, second = slot.tensor(), slot.tensor()
            assert first.data_ptr() == second.data_ptr() == address
            assert first.data_ptr() % 512 == 0


def test_cupy_reads_and_writes_slots() -> None:
    cupy = pytest.importorskip("cupy")
    with ring_pair("device") as (producer, consumer):
        stream = cupy.cuda.Stream(non_blocking=True)
        with producer.reserve(0, stream=stream) as slot, stream:
            cupy.asarray(slot.array((4, 8), "float32"))[...] = cupy.arange(32, dtype=cupy.float32).reshape(4, 8)
        with consumer.receive(0) as slot:
            expected = torch.arange(32.0, device="cuda").view(4, 8)
            assert torch.equal(slot.tensor(), expected)
            assert bool((cupy.from_dlpack(slot.array()) == cupy.from_dlpack(expected)).all())
            assert bool((cupy.asarray(slot.array()) == cupy.asarray(expected)).all())
            target = cupy.zeros((4, 8), dtype=cupy.float32)
            slot.copy_to(target)
        consumer.synchronize()
        torch.cuda.synchronize()
        assert bool((target == cupy.asarray(expected)).all())


# --- streams ---


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_commit_returns_at_once_and_publishes_after_the_work(placement: str) -> None:
    with ring_pair(placement) as (producer, consumer):
        for ticket in range(2):  # the first time loads kernels
            torch.cuda.synchronize()
            with producer.reserve(ticket) as slot:
                rows = slot.tensor((128, 1024), torch.float32)
                rows.fill_(0)
                spin(100)
                rows.fill_(ticket + 1)
            assert not torch.cuda.current_stream().query(), "the stream was waited for"
            assert consumer.try_receive(ticket) is None
            with consumer.receive(ticket) as slot:
                assert bool((slot.tensor() == ticket + 1).all())


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_slot_is_free_after_its_readers_stream(placement: str) -> None:
    with ring_pair(placement) as (producer, consumer):
        reading = torch.cuda.Stream()
        numbers(1).sum(dtype=torch.float64).item()  # loads the kernel, for which later the stream would be waited for
        results = []
        for ticket in range(4 * NUM_SLOTS):
            with producer.reserve(ticket) as slot:
                slot.tensor((128, 1024), torch.float32).fill_(ticket)
            with torch.cuda.stream(reading), consumer.receive(ticket) as slot:
                rows = slot.tensor()
                spin(5)
                results.append(rows.sum(dtype=torch.float64))
            assert not consumer.is_free(ticket + NUM_SLOTS)
        torch.cuda.synchronize()
        assert [float(result) for result in results] == [128 * 1024 * ticket for ticket in range(4 * NUM_SLOTS)]


def test_given_up_slot_is_free_after_the_stream() -> None:
    with ring_pair("device") as (producer, consumer):
        stream = torch.cuda.Stream()
        error = RuntimeError("the teacher stumbled")
        with pytest.raises(RuntimeError, match="stumbled"), torch.cuda.stream(stream):  # noqa: SIM117, PT012
            with producer.reserve(0) as slot:
                rows = slot.tensor((128, 1024), torch.float32)
                spin(50)
                rows.fill_(666)
                raise error
        with pytest.raises(SlotAborted, match="the teacher stumbled"):
            consumer.receive(0)
        assert stream.query()
        consumer.reclaim(0)
        with producer.reserve(0) as slot:
            slot.copy_from(numbers(1))
        with consumer.receive(0) as slot:
            assert bool((slot.tensor() == 1).all())


def test_streams_by_any_name() -> None:
    stream = torch.cuda.Stream()

    class Named:
        def __cuda_stream__(self) -> tuple[int, int]:
            return (0, stream.cuda_stream)

    with ring_pair("device") as (producer, _consumer):
        for ticket, name in enumerate((stream, Named(), stream.cuda_stream)):
            with producer.reserve(ticket, stream=name) as slot:
                assert slot.stream == stream.cuda_stream
                slot.copy_from(numbers(1))
        with torch.cuda.stream(stream), producer.reserve(3) as slot:
            assert slot.stream == stream.cuda_stream
            slot.copy_from(numbers(1))


# --- misuse ---


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tensors_kept_after_release_fail_loudly(placement: str) -> None:
    weight = torch.ones(8, 2, device="cuda", requires_grad=True)
    with ring_pair(placement) as (producer, consumer):
        with producer.reserve(0) as written:
            kept_by_producer = written.tensor((4, 8), torch.float32)
            kept_by_producer.fill_(1)
        with consumer.receive(0) as slot:
            kept = slot.tensor()
            loss = (kept @ weight).sum()
        assert kept.numel() == kept_by_producer.numel() == 0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        with pytest.raises(TransportError, match="ticket 0: this slot was given back"):
            slot.tensor()


def test_staging_is_kept_for_the_streams_that_copy_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, record_stream = [], torch.Tensor.record_stream

    def record(tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        kept.append(stream)
        record_stream(tensor, stream)

    monkeypatch.setattr(torch.Tensor, "record_stream", record)
    first, last = torch.cuda.current_stream(), torch.cuda.Stream()
    with ring_pair("pinned") as (producer, consumer):
        with producer.reserve(0) as slot:
            slot.tensor((4,), torch.int32).fill_(1)
            last.wait_stream(first)
            slot.use_stream(last)
        assert kept == [first, last]
        with consumer.receive(0) as slot:
            assert slot.tensor().data_ptr() == slot.tensor().data_ptr()
            slot.use_stream(last)
        assert kept == [first, last] * 2


def test_tensors_of_another_kind_are_refused() -> None:
    with ring_pair("device") as (producer, _consumer), producer.reserve(0) as slot:
        with pytest.raises(ValueError, match="expected one on cuda:0, where this ring was attached, got cpu"):
            slot.copy_from(torch.zeros(4))
        with pytest.raises(ValueError, match=r"call \.contiguous"):
            slot.copy_from(torch.zeros(4, 4, device="cuda").T)
        with pytest.raises(ValueError, match="slot_bytes"):
            slot.copy_from(torch.zeros(MIB, device="cuda"))
        slot.copy_from(numbers(1))


def test_view_of_a_view_keeps_the_memory_mapped() -> None:
    with ring_pair("device") as (producer, consumer):
        with producer.reserve(0) as slot:
            slot.copy_from(numbers(3))
        with consumer.receive(0) as slot:
            part = slot.tensor()[1:]
    assert bool((part == 3).all())  # both ends are closed; the slab goes with the last view


# --- leaks ---


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ten_thousand_records_leave_nothing_behind(placement: str) -> None:
    source, target = numbers(1), numbers(0)
    with ring_pair(placement) as (producer, consumer):
        before = None
        for ticket in range(10_000):
            with producer.reserve(ticket) as slot:
                slot.copy_from(source)
            with consumer.receive(ticket) as slot:
                slot.copy_to(target)
            if ticket == 100:
                before = taken()
        torch.cuda.synchronize()
        assert taken() == before


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_attachments_leave_nothing_behind(placement: str) -> None:
    before = None
    for _ in range(100):
        with ring_pair(placement, slot_bytes=8 * MIB) as (producer, _consumer):
            producer.reserve(0).abort("only to use the slab")
        del producer, _consumer
        gc.collect()
        if before is None:
            time.sleep(0.1)  # a thread that was joined is in /proc for a moment longer
            before = taken()
    time.sleep(0.1)
    assert taken() == before


def taken() -> tuple[int, int, int]:
    """Device memory in use, descriptors and threads of this process."""
    free, total = torch.cuda.mem_get_info()
    return total - free, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


# --- across processes ---


def produce(handle: str, first: int, count: int) -> None:
    with CudaRing.attach(handle, role="producer") as producer:
        for ticket in range(first, first + count):
            with producer.reserve(ticket, timeout_s=60) as slot:
                rows = slot.tensor((128, 1024), torch.float32)
                spin(1)
                rows.fill_(ticket)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_records_cross_processes(placement: str) -> None:
    with create(placement) as made, CudaRing.attach(made.handle, role="consumer") as consumer:
        child = Spawned(produce, made.handle, 0, 200)
        consumer.wait_for_peer(timeout_s=60)
        for ticket in range(200):
            with consumer.receive(ticket, timeout_s=60) as slot:
                assert bool((slot.tensor() == ticket).all())
        assert child.join() == 0


def produce_and_hang(handle: str) -> None:
    """Committed, as Python sees it, while the stream is busy."""
    producer = CudaRing.attach(handle, role="producer")
    warm = numbers(1)
    spin(1)
    torch.cuda.synchronize()
    with producer.reserve(0, timeout_s=60) as slot:
        spin(5_000)
        slot.copy_from(warm)
    say("committed")
    time.sleep(60)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_writer_killed_between_copy_and_publish(placement: str) -> None:
    with create(placement) as made, CudaRing.attach(made.handle, role="consumer") as consumer:
        child = Spawned(produce_and_hang, made.handle)
        assert child.line() == "committed"
        assert consumer.try_receive(0) is None
        child.kill()
        with pytest.raises(PeerDied, match=f"producer pid {child.pid} died while writing it"):
            consumer.receive(0, timeout_s=60)
        consumer.reclaim(0)
        other = Spawned(produce, made.handle, 0, 2)
        until(lambda: consumer.stats().producers.attached == 2, 60)  # it may have gone again
        for ticket in range(2):
            with consumer.receive(ticket, timeout_s=60) as slot:
                assert bool((slot.tensor() == ticket).all())
        assert other.join() == 0


def own_and_hang(handle: str) -> None:
    consumer = CudaRing.attach(handle, role="consumer")
    slot = consumer.receive(0, timeout_s=60)
    slot.tensor().sum().item()
    spin(5_000)
    slot.release()
    say("reading")
    time.sleep(60)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_owner_killed(placement: str) -> None:
    with create(placement) as made:
        child = Spawned(own_and_hang, made.handle)
        with CudaRing.attach(made.handle, role="producer") as producer:
            for ticket in range(NUM_SLOTS - 1):
                with producer.reserve(ticket, timeout_s=60) as slot:
                    slot.copy_from(numbers(ticket))
            assert child.line() == "reading"
            with producer.reserve(NUM_SLOTS - 1) as slot:
                spin(300)  # still to be written when the owner is gone
                slot.copy_from(numbers(NUM_SLOTS - 1))
            child.kill()
            producer.synchronize()
            with pytest.raises(PeerDied):
                producer.reserve(NUM_SLOTS, timeout_s=60)
        assert bool((numbers(5) == 5).all()), "the device still works"


def produce_until_told(handle: str) -> None:
    producer = CudaRing.attach(handle, role="producer")
    source = numbers(1)
    try:
        for ticket in range(1_000_000):
            with producer.reserve(ticket, timeout_s=60) as slot:
                slot.copy_from(source)
    except PeerDied:
        producer.close()
        assert bool((source == 1).all())
        say("told")


def test_owner_frees_when_its_producers_have_left() -> None:
    with create("device", slot_bytes=64 * MIB) as made:
        consumer = CudaRing.attach(made.handle, role="consumer")
        child = Spawned(produce_until_told, made.handle)
        consumer.wait_for_peer(timeout_s=60)
        for ticket in range(20):
            consumer.receive(ticket, timeout_s=60).release()
        consumer.close(grace_s=60)
        assert child.line() == "told"
        assert child.join() == 0


def idle_producer(handle: str, device: int) -> None:
    CudaRing.attach(handle, role="producer", device=device).reserve(0, timeout_s=60).abort("only to open the slab")
    say(str(torch.cuda.mem_get_info(0)[0]))
    time.sleep(60)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_opening_makes_no_context_on_the_owners_device() -> None:
    with create("device") as made, CudaRing.attach(made.handle, role="consumer", device=0):
        before = torch.cuda.mem_get_info(0)[0]
        child = Spawned(idle_producer, made.handle, 1)
        child.line()
        assert before - torch.cuda.mem_get_info(0)[0] < 64 * MIB
        child.kill()


def test_ring_times_out_while_its_peer_lives() -> None:
    with ring_pair("device") as (_producer, consumer), pytest.raises(RingTimeout, match="slot 0 is free for ticket 0"):
        consumer.receive(0, timeout_s=0.1)


# --- the channel between student and teacher ---


def serve(requests: str, hidden: str) -> None:
    ring = CudaRing.attach(hidden, role="producer")
    server = HiddenStatesServer(RequestRing.attach(requests, role="consumer"), {0: ring}, timeout_s=60)

    def prefill(microbatch: Microbatch, out: torch.Tensor) -> float:
        ids = torch.tensor(microbatch.input_ids, device="cuda")
        states = ids[:, None].expand(-1, out.shape[1]).to(out.dtype)
        spin(2)
        torch.index_select(states, 0, torch.tensor(microbatch.loss_rows, device="cuda"), out=out)
        return 0.001

    server.serve(8, torch.bfloat16, prefill)
    ring.close()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_channel_between_devices(placement: str) -> None:
    made = create(placement)
    requests = RequestRing.create(name="requests", num_slots=4, slot_bytes=request_bytes(12))
    child = Spawned(serve, requests.handle, made.handle)
    sender = RequestRing.attach(requests.handle, role="producer")
    with CudaRing.attach(made.handle, role="consumer") as consumer:
        sender.wait_for_peer(timeout_s=60)
        client = HiddenStatesClient({"": sender}, consumer, rank=0, timeout_s=60)
        microbatches = [
            Microbatch(np.arange(n, n + 12, dtype=np.int32), (5, 7), np.array([0, 3, 11], np.int32), (n,))
            for n in range(20)
        ]
        sums = []
        for pending in client.prefetch(microbatches):
            with pending:
                rows = pending.tensor()
                assert rows.shape == (3, 8)
                spin(2)
                sums.append(rows.float().sum())
        assert [float(s) for s in sums] == [8.0 * (3 * n + 14) for n in range(20)]
        sender.close()
    assert child.join() == 0
