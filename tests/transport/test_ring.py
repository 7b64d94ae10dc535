"""The ring's Python face, across real processes.

Children are forked where they only touch the ring, and fresh interpreters where that is the point.
"""

from __future__ import annotations

import asyncio
import faulthandler
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor

from kdflow.errors import PeerDied, RingCorrupt, RingTimeout, SlotAborted, TransportError
from kdflow.transport.ring import HiddenRing
from support.ring import Child, hang, write

DTYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]


# --- tensors ---


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_arrives_bit_for_bit(ring: HiddenRing, dtype: torch.dtype) -> None:
    raw = torch.arange(3 * 5 * dtype.itemsize, dtype=torch.uint8) % 2
    expected = raw.view(dtype).view(3, 5)

    def produce() -> None:
        with HiddenRing.attach(ring.handle, role="producer").reserve(0) as slot:
            slot.tensor((3, 5), dtype).copy_(expected)

    child = Child(produce)
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with consumer.receive(0) as slot:
        got = slot.tensor()
        assert got.dtype == dtype
        assert got.shape == (3, 5) == slot.shape
        assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
        assert slot.writer_pid == child.pid
    assert child.join() == 0


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (), (1,), (2048,), (2, 2, 2, 2, 2, 2, 2, 2)])
def test_shapes_from_no_row_to_a_full_slot(ring: HiddenRing, shape: tuple[int, ...]) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    write(producer, 0, 7, shape)
    with consumer.receive(0) as slot:
        assert slot.tensor().shape == shape
        assert bool((slot.tensor() == 7).all())
        assert (slot.microbatch_id, slot.tag) == (7, -7)


SOURCES = {
    "contiguous": torch.arange(600).view(30, 20).bfloat16(),
    "every other row": torch.arange(600).view(30, 20).float()[::2],
    "transposed": torch.arange(60).view(6, 10).float().T,
    "no rows": torch.empty(0, 8),
    "scalar": torch.tensor(3.5),
    "lazily conjugated": torch.tensor([1 + 2j]).conj(),
    "lazily negated": torch.tensor([1 + 2j]).conj().imag,
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
@pytest.mark.parametrize("in_one_call", [True, False], ids=["put", "copy_from"])
def test_a_whole_tensor_is_copied_in(ring: HiddenRing, source: torch.Tensor, in_one_call: bool) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    if in_one_call:
        producer.put(source, 0, microbatch_id=17, tag=3)
    else:
        with producer.reserve(0) as slot:
            slot.copy_from(source)
            slot.microbatch_id, slot.tag = 17, 3
    with consumer.receive(0) as received:
        assert (received.microbatch_id, received.tag) == (17, 3)
        assert received.tensor().dtype == source.dtype
        assert torch.equal(received.tensor(), source)


def test_copy_from_refuses(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    with pytest.raises(ValueError, match="at most 4096 bytes"), producer.reserve(1) as slot:
        slot.copy_from(torch.empty(1025))
    with pytest.raises(TransportError, match="was given back"):
        slot.copy_from(torch.empty(1))


def test_put_that_does_not_fit_leaves_the_ticket(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with pytest.raises(ValueError, match=r"at most 4096 bytes \(slot_bytes\), got 4100"):
        producer.put(torch.empty(1025))
    with pytest.raises(ValueError, match="dtype: expected one of"):
        producer.put(torch.empty(3, dtype=torch.complex32))
    producer.put(torch.ones(1024))
    with consumer.receive() as received:
        assert received.ticket == 0
    for _ in range(ring.num_slots):
        producer.put(torch.ones(1))
    with pytest.raises(RingTimeout, match="alive as consumer"):
        producer.put(torch.ones(1), timeout_s=0.05)


def free_huge_pages() -> int:
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("HugePages_Free")), 0)


@pytest.mark.parametrize("options", [{"numa_node": 0}, {"huge_pages": True}], ids=["NUMA node", "huge pages"])
def test_memory_of_a_kind(options: dict[str, Any]) -> None:
    if "huge_pages" in options and free_huge_pages() < 4:
        with pytest.raises(TransportError, match=r"vm\.nr_hugepages"):
            HiddenRing.create(name="kind", num_slots=1 << 10, slot_bytes=2 << 20, **options)
        pytest.skip("needs four free huge pages: sysctl vm.nr_hugepages=4")
    try:
        ring = HiddenRing.create(name="kind", num_slots=2, slot_bytes=4096, **options)
    except TransportError as error:  # as in a container without CAP_SYS_NICE
        if "not permitted" not in str(error):
            raise
        pytest.skip(str(error))
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer", guard=True)
    for value in range(5):
        producer.put(torch.full((512,), value))
        with consumer.receive() as received:
            assert received.tensor().tolist() == [value] * 512
    maps = Path("/proc/self/numa_maps").read_text(encoding="ascii")
    ours = [line for line in maps.splitlines() if "memfd:kind" in line]
    expected = "prefer:0" if "numa_node" in options else "kernelpagesize_kB=2048"
    assert any(expected in line for line in ours)


def test_numa_nodes_that_are_not_there() -> None:
    with pytest.raises(TransportError, match=r"numa_node: expected a node with memory .*, got 900"):
        HiddenRing.create(name="kind", num_slots=1, slot_bytes=64, numa_node=900)
    with pytest.raises(ValueError, match="numa_node: no node -1"):
        HiddenRing.create(name="kind", num_slots=1, slot_bytes=64, numa_node=-1)


@pytest.mark.parametrize("excess", [0, 1, 63, 64, 4095])
def test_a_ring_larger_than_the_caches(excess: int) -> None:
    """There whole tensors are stored past the caches, 64 bytes at a time and the rest as ever."""
    slot_bytes = 16 << 20
    ring = HiddenRing.create(name="large", num_slots=8, slot_bytes=slot_bytes)
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    source = torch.randint(0, 256, (65536 + excess + 1,), dtype=torch.uint8)[1:]  # not aligned either
    producer.put(source)
    with consumer.receive() as received:
        assert torch.equal(received.tensor(), source)


def without_memory(kind: str) -> Any:
    if kind == "fake":
        with FakeTensorMode():
            return torch.ones(16)
    if kind == "zero":
        return torch._efficientzerotensor(16)
    return masked_tensor(torch.arange(4.0), torch.tensor([True, False, True, True]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors", "ignore:Accessing the data pointer")
@pytest.mark.parametrize("kind", ["fake", "zero", "masked"])
def test_tensors_without_memory_are_refused(ring: HiddenRing, kind: str) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    source = without_memory(kind)
    with pytest.raises(ValueError, match=r"memory of its own.*to_local"):
        producer.put(source, 0)
    with pytest.raises(ValueError, match=r"memory of its own.*to_local"), producer.reserve(0) as slot:
        slot.copy_from(source)


def test_arrays_of_numpy_are_refused(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    with pytest.raises(TypeError, match="expected a torch tensor, got ndarray"):
        producer.put(np.ones(4), 0)  # type: ignore[arg-type]


def test_tensors_of_inference_mode_end_with_the_slot(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with producer.reserve(0) as slot, torch.inference_mode():
        written = slot.tensor((4,), torch.float32).fill_(1)
    with consumer.receive(0) as slot:
        with torch.inference_mode():
            read = slot.tensor()
        assert read.sum() == 4
    assert written.numel() == read.numel() == 0
    assert ring.is_free(4)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError("no words")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError("no file \udcff"), r"OSError: no file \?"),
        (Unspeakable(), "Unspeakable: <exception str"),
    ],
)
def test_any_error_of_a_producer_is_told(ring: HiddenRing, error: Exception, told: str) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with pytest.raises(type(error)), producer.reserve(0):
        raise error
    with pytest.raises(SlotAborted, match=told):
        consumer.receive(0, timeout_s=10)


def test_a_block_that_writes_nothing_gives_the_slot_up(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with pytest.raises(ValueError, match="nothing was written"), producer.reserve(0) as slot:
        pass
    with pytest.raises(SlotAborted, match="nothing was written"):
        consumer.receive(0, timeout_s=10)
    del slot


def test_no_row_of_float8(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with producer.reserve(0) as slot:
        slot.tensor((0, 16), torch.float8_e4m3fn)
    with consumer.receive(0) as slot:
        assert (slot.tensor().shape, slot.tensor().dtype) == ((0, 16), torch.float8_e4m3fn)


def test_what_was_not_attached_is_told(ring: HiddenRing) -> None:
    with pytest.raises(TransportError, match="created but not attached"):
        ring.ready_fd()


def test_one_element_too_many(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with pytest.raises(ValueError, match=r"at most 4096 bytes \(slot_bytes\), got 4098"):
        write(producer, 0, 1, (2049,))
    with pytest.raises(SlotAborted, match="got 4098"):
        consumer.receive(0)


def test_one_copy_in_all(ring: HiddenRing) -> None:
    """Both sides see the same memory: the producer's view and the consumer's are one mapping apart."""
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    for ticket in range(8):
        with producer.reserve(ticket) as slot:
            slot.tensor((16,), torch.int32).fill_(ticket)
        with consumer.receive(ticket) as slot:
            first, second = slot.tensor(), slot.tensor()
            assert first.data_ptr() == second.data_ptr()
            assert first.data_ptr() % 4096 == 0


def test_released_views_fail_loudly(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    weight = torch.ones(8, 2, dtype=torch.bfloat16, requires_grad=True)
    with producer.reserve(0) as written:
        kept_by_producer = written.tensor((4, 8), torch.bfloat16)
        kept_by_producer.fill_(1)
    with consumer.receive(0) as slot:
        kept, kept_bytes = slot.tensor(), slot.buffer()
        loss = (kept @ weight).sum()
    for tensor in (kept, kept_by_producer):
        assert tensor.numel() == 0
    with pytest.raises(ValueError, match="released"):
        bytes(kept_bytes)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    for view in (slot.tensor, slot.buffer, lambda: written.tensor((1,), torch.int8)):
        with pytest.raises(TransportError, match="ticket 0: this slot was given back"):
            view()
    with pytest.raises(TransportError, match="given back before"):
        slot.release()


def test_guarded_pages_fault_after_release(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    write(producer, 0, 1)

    def read_too_late() -> None:
        faulthandler.disable()  # the fault is wanted: no report of it, no core file
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        consumer = HiddenRing.attach(ring.handle, role="consumer", guard=True)
        with consumer.receive(0) as slot:
            part = slot.tensor()[1:]  # a view that release does not know of
            assert part.sum() == 24
        part.sum()

    assert Child(read_too_late).join() == -signal.SIGSEGV


def test_view_outlives_its_ring(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    write(producer, 0, 3)
    slot = consumer.receive(0)
    rows = slot.tensor()
    consumer.close()
    ring.close()
    assert bool((rows == 3).all())  # still mapped, though anybody may write there now
    with pytest.raises(TransportError, match="closed"):
        consumer.receive(1)


def test_without_torch(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with producer.reserve() as slot:
        slot.buffer(5)[:] = b"hello"
    with consumer.receive() as slot:
        assert bytes(slot.buffer()) == b"hello"
        with pytest.raises(TypeError, match="read-only"):
            slot.buffer()[0] = 0
    with pytest.raises(ValueError, match="nothing was written"), producer.reserve():
        pass


# --- ways to hand a ring over ---

ATTACH = """
import os, socket, sys
from kdflow.transport.ring import HiddenRing
how, value = sys.argv[1:]
if how == "scm_rights":
    with socket.socket(fileno=int(value)) as peer:
        source = socket.recv_fds(peer, 1, 1)[1][0]
else:
    source = int(value) if how == "inherited" else value
ring = HiddenRing.attach(source, role="producer")
with ring.reserve() as slot:
    slot.buffer(2)[:] = b"ok"
"""


@pytest.mark.parametrize("how", ["handle", "inherited", "scm_rights"])
def test_handed_to_another_interpreter(ring: HiddenRing, how: str) -> None:
    here, there = socket.socketpair()
    value = {"handle": ring.handle, "inherited": str(ring.fileno()), "scm_rights": str(there.fileno())}
    with here, there:
        socket.send_fds(here, [b"r"], [ring.fileno()])
        command = [sys.executable, "-c", ATTACH, how, value[how]]
        subprocess.run(command, check=True, pass_fds=(ring.fileno(), there.fileno()))
    with HiddenRing.attach(ring.handle, role="consumer").receive() as slot:
        assert bytes(slot.buffer()) == b"ok"


def test_ring_outlives_its_creator() -> None:
    here, there = socket.socketpair()

    def create() -> None:
        made = HiddenRing.create(name="orphan", num_slots=2, slot_bytes=64)
        socket.send_fds(there, [b"r"], [made.fileno()])

    assert Child(create).join() == 0
    fd = socket.recv_fds(here, 1, 1)[1][0]
    producer = HiddenRing.attach(fd, role="producer")
    consumer = HiddenRing.attach(producer.handle, role="consumer")
    os.close(fd)
    write(producer, None, 1, (2,))
    consumer.receive().release()
    here.close()
    there.close()


def test_wrong_sources(ring: HiddenRing) -> None:
    with pytest.raises(ValueError, match='expected "pid:fd:id", got "nonsense"'):
        HiddenRing.attach("nonsense", role="producer")
    with pytest.raises(TransportError, match="cannot open ring handle"):
        HiddenRing.attach(f"{os.getpid()}:9999:1", role="producer")
    with open("/dev/null") as null, pytest.raises(RingCorrupt, match="not a kdflow ring"):
        HiddenRing.attach(null.fileno(), role="producer")
    with pytest.raises(ValueError, match="role"):
        HiddenRing.attach(ring.handle, role="reader")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="timeout_s"):
        HiddenRing.attach(ring.handle, role="consumer").receive(timeout_s=float("nan"))
    with pytest.raises(ValueError, match="num_slots must be in"):
        HiddenRing.create(name="none", num_slots=0, slot_bytes=64)
    with pytest.raises(TransportError, match="attach"):
        ring.receive(0)


# --- waiting ---


def test_ctrl_c_ends_a_wait(ring: HiddenRing) -> None:
    code = (
        "import signal, sys\nfrom kdflow.transport.ring import HiddenRing\n"
        # Shells have background jobs ignore it, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "ring = HiddenRing.attach(sys.argv[1], role='consumer')\n"
        "print('waiting', flush=True)\n"
        "try:\n    ring.receive(timeout_s=60)\nexcept KeyboardInterrupt:\n    sys.exit(7)\n"
    )
    command = [sys.executable, "-c", code, ring.handle]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.1)
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 7


def test_waiting_lets_other_threads_run_and_burns_no_core(ring: HiddenRing) -> None:
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    cpu = time.process_time()

    def wait() -> None:
        with pytest.raises(RingTimeout):
            consumer.receive(timeout_s=1.0)

    waiter = threading.Thread(target=wait)
    waiter.start()
    beats = 0
    while waiter.is_alive():
        time.sleep(0.01)
        beats += 1
    assert beats > 20
    assert time.process_time() - cpu < 0.3  # a spinning waiter would have used the whole second


def test_asyncio(ring: HiddenRing) -> None:
    consumer = HiddenRing.attach(ring.handle, role="consumer")

    def produce() -> None:
        producer = HiddenRing.attach(ring.handle, role="producer")
        for value in range(50):
            write(producer, None, value)

    async def consume() -> list[int]:
        ready = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(consumer.ready_fd(), ready.set)
        seen: list[int] = []
        while len(seen) < 50:
            await asyncio.wait_for(ready.wait(), timeout=20)
            ready.clear()
            while len(seen) < 50 and (slot := consumer.try_receive()) is not None:
                with slot:
                    seen.append(slot.microbatch_id)
        loop.remove_reader(consumer.ready_fd())
        return seen

    child = Child(produce)
    assert asyncio.run(consume()) == list(range(50))
    assert child.join() == 0


def test_pollable_tells_of_departures(ring: HiddenRing) -> None:
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    child = Child(lambda: hang(HiddenRing.attach(ring.handle, role="producer")))
    consumer.wait_for_peer()
    while select.select([consumer.ready_fd()], [], [], 0.2)[0]:
        assert consumer.try_receive() is None
    child.kill()
    assert select.select([consumer.ready_fd()], [], [], 20)[0]
    with pytest.raises(PeerDied, match="no producer is left"):
        consumer.try_receive()
