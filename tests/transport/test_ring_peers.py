"""Peers of the ring that die, come again, and are many, across real processes."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from kdflow.errors import KdflowError, PeerDied, RingTimeout, SlotAborted, TransportError
from kdflow.transport.ring import HiddenRing, RequestRing
from support.ring import Child, hang, write

EXAMPLES = Path(__file__).parents[2] / "examples"

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


def test_reason_of_an_abort_may_be_long_and_in_any_language(ring: HiddenRing) -> None:
    producer = HiddenRing.attach(ring.handle, role="producer")
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    with pytest.raises(RuntimeError), producer.reserve(0):
        raise RuntimeError("文件找不到" * 30)
    with pytest.raises(SlotAborted, match="gave it up: RuntimeError: 文件找不到"):
        consumer.receive(0)


def test_who_is_refused_was_never_a_peer(ring: HiddenRing) -> None:
    """Others would take it for one that died."""
    requests = RequestRing.create(name="requests", num_slots=1, slot_bytes=64)
    with pytest.raises(ValueError, match="expected a ring of tensors, got one of requests; attach it as RequestRing"):
        HiddenRing.attach(requests.handle, role="consumer")
    with pytest.raises(ValueError, match="expected a ring of requests, got one of tensors; attach it as HiddenRing or"):
        RequestRing.attach(ring.handle, role="producer")
    with RequestRing.attach(requests.handle, role="producer") as sender:
        sender.send(b"fills it")
        with pytest.raises(RingTimeout, match="no consumer is attached"):
            sender.send(b"waits for the first receiver", timeout_s=0.15)
    assert requests.stats().consumers.attached == ring.stats().producers.attached == 0


@pytest.mark.parametrize("role", ["producer", "consumer"])
def test_a_peer_that_becomes_another_program_is_gone(ring: HiddenRing, role: str) -> None:
    """exec() keeps pid and start time, and the pidfd of others, but no memory."""
    here, there = os.pipe()

    def become() -> None:
        peer = HiddenRing.attach(ring.handle, role=role)  # pyright: ignore[reportArgumentType]
        held = peer.reserve(0) if role == "producer" else peer.receive(0)
        os.read(here, 1)
        os.execv("/bin/sleep", ["sleep", str(60 + held.ticket)])

    other = HiddenRing.attach(ring.handle, role="consumer" if role == "producer" else "producer")
    if role == "consumer":
        write(other, 0, 1)
    child = Child(become)
    while other.peers()[role] != (child.pid,):  # pyright: ignore[reportArgumentType]
        time.sleep(0.001)
    os.write(there, b"x")
    with pytest.raises(PeerDied):
        other.receive(0, timeout_s=20) if role == "producer" else other.reserve(4, timeout_s=20)
    assert ring.stats().died == 1
    child.kill()


def test_forked_child_may_look_while_its_parent_looks(ring: HiddenRing) -> None:
    """Other threads of the parent may hold any lock at the time of the fork."""
    child = Child(lambda: hang(HiddenRing.attach(ring.handle, role="producer")))
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    consumer.wait_for_peer(timeout_s=20)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            consumer.wait_for_peer()

    def look_once() -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler would not run where it hangs
        signal.alarm(10)
        assert consumer.peers()["producer"] == (child.pid,)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert Child(look_once).join() == 0
    finally:
        done.set()
        for thread in threads:
            thread.join()
    child.kill()


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


def test_without_descriptors_the_living_stay_alive(ring: HiddenRing) -> None:
    """Taken for dead, a writer would get a second one beside it."""
    consumer = HiddenRing.attach(ring.handle, role="consumer")
    child = Child(lambda: hang(HiddenRing.attach(ring.handle, role="producer").reserve(0)))
    while consumer.is_free(0):
        time.sleep(0.001)

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 8, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        with pytest.raises(RingTimeout, match=rf"alive as producer: pid {child.pid}"):
            consumer.receive(0, timeout_s=0.15)
        assert consumer.peers()["producer"] == (child.pid,)
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    child.kill()
    with pytest.raises(PeerDied):
        consumer.receive(0, timeout_s=20)


def test_forked_child_sees_its_parent_die(ring: HiddenRing) -> None:
    here, there = os.pipe()

    def attach_and_die() -> None:
        inherited = HiddenRing.attach(ring.handle, role="producer")
        parent = os.getpid()

        def watch() -> None:
            assert inherited.peers()["producer"] == (parent,)
            while os.getppid() == parent:
                time.sleep(0.001)
            os.write(there, repr((inherited.peers()["producer"], inherited.stats().producers.live)).encode())

        Child(watch)
        time.sleep(0.05)  # it sees the parent alive first

    assert Child(attach_and_die).join() == 0
    os.close(there)
    with open(here) as answer:
        assert answer.read() == "((), 0)"


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


CYCLES = """
import os
import torch
from kdflow.transport.ring import HiddenRing

def cycle():
    with HiddenRing.create(name="cycle", num_slots=2, slot_bytes=64) as made:
        producer = HiddenRing.attach(made.handle, role="producer")
        with HiddenRing.attach(made.handle, role="consumer") as consumer:
            consumer.ready_fd()
            with producer.reserve(0) as slot:
                slot.tensor((2,), torch.float32).fill_(1)
            consumer.receive(0).release()

cycle()
before = sorted(os.listdir("/proc/self/fd"))
for _ in range(300):
    cycle()
after = sorted(os.listdir("/proc/self/fd"))
assert after == before, (before, after)
"""


def test_descriptors_stay_flat() -> None:
    """In an interpreter of its own: nothing of other tests is open there."""
    subprocess.run([sys.executable, "-c", CYCLES], check=True, timeout=60)


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
    # Else receivers leave when the first sender is done before the others have come.
    with RequestRing.attach(requests.handle, role="producer"):
        assert [child.join() for child in senders] == [0] * 3
    assert [child.join() for child in receivers] == [0] * 2
    os.close(inbox_write)
    with os.fdopen(inbox_read, "rb") as inbox:
        received = array.array("q", inbox.read())
    assert sorted(received) == list(numbers)


def test_request_that_does_not_fit_is_refused_at_once() -> None:
    requests = RequestRing.create(name="requests", num_slots=1, slot_bytes=64)
    sender = RequestRing.attach(requests.handle, role="producer")
    sender.send(b"x")
    with pytest.raises(ValueError, match=r"send .*at most 64 bytes \(slot_bytes\), got 65"):
        sender.send(b"y" * 65)
    assert sender.stats().producers.waits == sender.stats().aborted == 0


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
