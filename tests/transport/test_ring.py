"""The ring's Python face, across real processes.

Children are forked where they only touch the ring, and fresh interpreters where that is the point.
"""

from __future__ import annotations

import array
import asyncio
import faulthandler
import gc
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from kdflow.errors import KdflowError, PeerDied, RingCorrupt, RingTimeout, SlotAborted, TransportError
from kdflow.transport.ring import HiddenRing, RequestRing

EXAMPLES = Path(__file__).parents[2] / "examples"
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


@pytest.fixture
def ring() -> Iterator[HiddenRing]:
    with HiddenRing.create(name="hidden[0]", num_slots=4, slot_bytes=4096) as made:
        yield made


class Child:
    """A forked process that runs `body` and can be killed."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)

    def join(self) -> int:
        """Exit code, or minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.join()


def write(ring: HiddenRing, ticket: int | None, value: int, shape: tuple[int, ...] = (4, 8)) -> None:
    with ring.reserve(ticket) as slot:
        slot.tensor(shape, torch.bfloat16).fill_(value)
        slot.microbatch_id = value
        slot.tag = -value


def hang(*held: object) -> None:
    """Keeps what it is given until somebody kills the process."""
    time.sleep(60)


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


# --- deaths ---


def test_producer_killed_while_writing(ring: HiddenRing) -> None:
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    other = HiddenRing.attach(ring.handle, role="producer")
    child = Child(lambda: hang(HiddenRing.attach(ring.handle, role="producer").reserve(17 % 4)))
    while consumer.is_free(1):
        time.sleep(0.001)
    timer = threading.Timer(0.1, child.kill)
    timer.start()
    with pytest.raises(PeerDied, match=rf"hidden\[0\]: receive of ticket 1: producer pid {child.pid}") as died:
        consumer.receive(1, timeout_s=20)
    timer.join()
    assert died.value.ticket == 1
    with pytest.raises(TransportError, match="given to another producer, or is over"):
        other.reserve(1)
    consumer.reclaim(1)
    write(other, 1, 5)
    with consumer.receive(1) as slot:
        assert slot.microbatch_id == 5
    assert consumer.stats().abandoned == consumer.stats().died == consumer.stats().reclaimed == 1


def test_record_of_a_dead_producer_is_delivered(ring: HiddenRing) -> None:
    consumer = HiddenRing.attach(ring.handle, role="consumer")

    def produce() -> None:
        write(HiddenRing.attach(ring.handle, role="producer"), None, 9)
        os.kill(os.getpid(), signal.SIGKILL)

    assert Child(produce).join() == -signal.SIGKILL
    with consumer.receive() as slot:
        assert slot.microbatch_id == 9
    with pytest.raises(PeerDied, match="no producer is left of 1 attached"):
        consumer.receive(timeout_s=20)


def test_consumer_killed_while_reading(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    for value in range(4):
        write(producer, None, value)
    child = Child(lambda: hang(HiddenRing.attach(ring.handle, role="consumer").receive()))
    while producer.stats().reading == 0:
        time.sleep(0.001)
    child.kill()
    with pytest.raises(PeerDied, match="no consumer is left"):
        producer.reserve(timeout_s=20)
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    for value in range(4):  # what the dead one held is delivered again
        with consumer.receive() as slot:
            assert slot.microbatch_id == value


def test_consumer_killed_while_waiting(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    child = Child(lambda: hang(HiddenRing.attach(ring.handle, role="consumer").receive(timeout_s=50)))
    producer.wait_for_peer()
    child.kill()
    for value in range(4):
        write(producer, None, value)
    with pytest.raises(PeerDied):
        producer.reserve(timeout_s=20)


def test_absent_producer_is_not_a_dead_one(ring: HiddenRing) -> None:
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with pytest.raises(RingTimeout, match="no producer is attached") as timeout:
        consumer.receive(3, timeout_s=0.2)
    assert timeout.value.ticket == 3
    assert isinstance(timeout.value, KdflowError)


def test_exception_aborts_the_slot(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with pytest.raises(ZeroDivisionError), producer.reserve(2) as slot:
        slot.tensor((1,), torch.float32).fill_(1 / 0)
    with pytest.raises(SlotAborted, match="gave it up: ZeroDivisionError: division by zero") as aborted:
        consumer.receive(2)
    assert aborted.value.ticket == 2
    consumer.reclaim(2)
    assert consumer.is_free(2)


def test_forked_child_must_attach_anew(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    held = producer.reserve(0)
    held.tensor((1,), torch.int8).fill_(1)

    def misuse_then_attach() -> None:
        for misuse in (held.commit, lambda: producer.reserve(1), lambda: consumer.receive(0)):
            with pytest.raises(TransportError, match="was forked from peer"):
                misuse()
        producer.close()
        write(HiddenRing.attach(ring.handle, role="producer"), 1, 4)

    assert Child(misuse_then_attach).join() == 0
    held.tensor((1,), torch.int8).fill_(2)
    held.commit()
    with consumer.receive(0) as first, consumer.receive(1) as second:
        assert (first.tensor().item(), second.microbatch_id) == (2, 4)


def test_nothing_is_left_behind() -> None:
    name = f"left-{os.getpid()}"

    def create_and_die() -> None:
        ring = HiddenRing.create(name=name, num_slots=2, slot_bytes=1 << 20)
        peers = [HiddenRing.attach(ring.handle, role=role) for role in ("producer", "consumer")]
        write(peers[0], None, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    assert Child(create_and_die).join() == -signal.SIGKILL
    assert not any(name in entry for entry in os.listdir("/dev/shm"))
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            assert name not in maps.read_text()
        except OSError:
            continue


def test_descriptors_stay_flat(ring: HiddenRing) -> None:
    def cycle() -> None:
        with HiddenRing.create(name="cycle", num_slots=2, slot_bytes=64) as made:
            producer = HiddenRing.attach(made.handle, role="producer")
            with HiddenRing.attach(made.handle, role="consumer") as consumer:
                consumer.ready_fd()
                write(producer, 0, 1, (2,))
                consumer.receive(0).release()

    cycle()
    gc.collect()  # what earlier tests left in tracebacks
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(300):
        cycle()
    assert len(os.listdir("/proc/self/fd")) <= before


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
    with pytest.raises(ValueError, match='expected "pid:fd", got "nonsense"'):
        HiddenRing.attach("nonsense", role="producer")
    with pytest.raises(TransportError, match="cannot open ring handle"):
        HiddenRing.attach(f"{os.getpid()}:9999", role="producer")
    with open("/dev/null") as null, pytest.raises(RingCorrupt, match="not a kdflow ring"):
        HiddenRing.attach(null.fileno(), role="producer")
    with pytest.raises(ValueError, match="role"):
        HiddenRing.attach(ring.handle, role="reader")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="not a RequestRing"):
        RequestRing.attach(ring.handle, role="producer")
    with pytest.raises(ValueError, match="timeout_s"):
        HiddenRing.attach(ring.handle, role="consumer").receive(timeout_s=float("nan"))
    with pytest.raises(ValueError, match="num_slots must be in"):
        HiddenRing.create(name="none", num_slots=0, slot_bytes=64)
    with pytest.raises(TransportError, match="attach"):
        ring.receive(0)


# --- waiting ---


def test_ctrl_c_ends_a_wait(ring: HiddenRing) -> None:
    code = (
        "import sys\nfrom kdflow.transport.ring import HiddenRing\n"
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


# --- many peers ---


def test_four_producers_fill_the_tickets_they_are_given(ring: HiddenRing) -> None:
    consumer = HiddenRing.attach(ring.handle, role="consumer")

    def produce(index: int) -> None:
        producer = HiddenRing.attach(ring.handle, role="producer")
        for ticket in range(index, 200, 4):
            write(producer, ticket, ticket)

    children = [Child(lambda index=index: produce(index)) for index in range(4)]
    for ticket in range(200):
        with consumer.receive(ticket) as slot:
            assert slot.microbatch_id == ticket
            assert bool((slot.tensor() == torch.tensor(ticket, dtype=torch.bfloat16)).all())
    assert [child.join() for child in children] == [0] * 4


def test_requests_of_many_reach_exactly_one() -> None:
    requests = RequestRing.create(name="requests", num_slots=8, slot_bytes=64)
    numbers = array.array("q", range(300))
    inbox_read, inbox_write = os.pipe()

    def send(part: array.array[int]) -> None:
        sender = RequestRing.attach(requests.handle, role="producer")
        sender.wait_for_peer()
        for number in part:
            sender.send(number.to_bytes(8, "little"))

    def receive() -> None:
        receiver = RequestRing.attach(requests.handle, role="consumer")
        receiver.wait_for_peer()
        while True:
            try:
                os.write(inbox_write, receiver.receive(timeout_s=20))
            except PeerDied:
                return

    receivers = [Child(receive) for _ in range(2)]
    senders = [Child(lambda part=numbers[i::3]: send(part)) for i in range(3)]
    assert [child.join() for child in senders + receivers] == [0] * 5
    os.close(inbox_write)
    with os.fdopen(inbox_read, "rb") as inbox:
        received = array.array("q", inbox.read())
    assert sorted(received) == list(numbers)


def test_request_of_a_dead_receiver_goes_to_another() -> None:
    requests = RequestRing.create(name="requests", num_slots=8, slot_bytes=64)
    sender = RequestRing.attach(requests.handle, role="producer")
    sender.send(b"first")
    sender.send(b"second")
    child = Child(lambda: hang(RequestRing.attach(requests.handle, role="consumer").lease()))
    while sender.stats().reading == 0:
        time.sleep(0.001)
    other = RequestRing.attach(requests.handle, role="consumer")
    assert other.receive() == b"second"
    child.kill()
    assert other.receive(timeout_s=20) == b"first"
    assert other.try_receive() is None
    with pytest.raises(ValueError, match="slot_bytes"):
        sender.send(bytes(65))


def test_stats_and_peers(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    for value in range(3):
        write(producer, None, value)
    consumer.receive().release()
    held = consumer.receive()
    stats = ring.stats()
    assert (stats.num_slots, stats.depth, stats.reading, stats.writing) == (4, 1, 1, 0)
    assert (stats.producers.records, stats.producers.bytes) == (3, 3 * 64)
    assert (stats.consumers.records, stats.consumers.live, stats.consumers.waits) == (2, 1, 0)
    held.release()
    assert ring.peers() == {"producer": (os.getpid(),), "consumer": (os.getpid(),)}
    producer.close()
    consumer.close()
    assert ring.peers() == {"producer": (), "consumer": ()}


def test_examples_run_as_shown() -> None:
    producer = subprocess.Popen([sys.executable, str(EXAMPLES / "ring_producer.py")], stdout=subprocess.PIPE, text=True)
    assert producer.stdout is not None
    handle = producer.stdout.readline().split()[-1]
    consumer = subprocess.run(
        [sys.executable, str(EXAMPLES / "ring_consumer.py"), handle],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert producer.wait(timeout=60) == 0
    producer.stdout.close()
    assert consumer.stdout.splitlines()[-1] == "9: (256, 1024) torch.bfloat16, sum 2359296"
