"""Orders to sleep: each worker gets one, sleeps while its record is held, and wakes or leaves with the student."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from kdflow.errors import PeerDied
from kdflow.transport import HiddenRing, RequestRing, Seats, SleepOrder, Turns, create_turn_ring
from support.processes import Spawned, say


def work(requests: str, turns: str, how_it_ends: str) -> None:
    """A worker that knows nothing but sleep."""
    ring, orders = HiddenRing.attach(turns, role="producer"), RequestRing.attach(requests, role="consumer")
    say("here")
    while True:
        try:
            order = SleepOrder.of(orders.lease(timeout_s=30.0))
        except PeerDied:
            return say("nobody to ask")
        assert order is not None
        say(f"order {order.ticket}")
        if how_it_ends == "hangs":
            time.sleep(120)
        if how_it_ends == "dies over its word":
            held = ring.reserve(order.ticket)
            os.kill(os.getpid(), signal.SIGKILL)
            held.commit()
        if not order.fulfil(ring, timeout_s=30.0):
            return say("left asleep")
        say("woke")


class Student:
    def __init__(self, num_workers: int) -> None:
        self.requests = RequestRing.create(name="requests", num_slots=8, slot_bytes=64)
        self.ring = create_turn_ring(num_workers)
        self.sender = RequestRing.attach(self.requests.handle, role="producer")
        self.consumer = HiddenRing.attach(self.ring.handle, role="consumer")
        self.turns = Turns([self.sender] * num_workers, self.consumer, timeout_s=30.0)

    def worker(self, how_it_ends: str = "") -> Spawned:
        spawned = Spawned(work, self.requests.handle, self.ring.handle, how_it_ends)
        assert spawned.line() == "here"
        return spawned

    def leave(self) -> None:
        self.consumer.close()
        self.sender.close()


@pytest.fixture
def student() -> Iterator[Student]:
    made = Student(2)
    yield made
    made.leave()


def test_each_worker_sleeps_once_a_turn(student: Student) -> None:
    workers = [student.worker() for _ in range(2)]
    for turn in range(4):  # more often than there are slots
        student.turns.teachers_sleep()
        orders = {worker.line() for worker in workers}
        assert orders == {f"order {2 * turn}", f"order {2 * turn + 1}"}
        student.turns.wake_teachers()
        assert [worker.line() for worker in workers] == ["woke", "woke"]
    student.leave()
    assert [worker.line() for worker in workers] == ["nobody to ask"] * 2


def test_an_order_outlives_its_worker(student: Student) -> None:
    first, second = student.worker(), student.worker("hangs")
    asleep = threading.Thread(target=student.turns.teachers_sleep)
    asleep.start()
    told = {first.line(), second.line()}
    assert told == {"order 0", "order 1"}
    second.kill()
    third = student.worker()
    assert third.line() in told
    asleep.join(30)
    assert not asleep.is_alive()
    student.turns.wake_teachers()
    assert (first.line(), third.line()) == ("woke", "woke")


def test_a_worker_that_dies_over_its_word_may_come_back(student: Student) -> None:
    seats = [Seats(student.requests.handle, [], student.ring.handle) for _ in range(2)]
    second = student.worker("dies over its word")
    asleep = threading.Thread(target=student.turns.teachers_sleep)
    asleep.start()
    assert second.join() == -signal.SIGKILL
    workers = [student.worker() for _ in range(2)]
    asleep.join(30)
    assert not asleep.is_alive()
    for _ in range(2):  # with what is left of the order that was sent twice
        assert student.ring.stats().reading == 2
        student.turns.wake_teachers()
        student.turns.teachers_sleep()
    for seat in seats:
        seat.leave()
    student.leave()
    assert [worker.join() for worker in workers] == [0, 0]


def test_where_nobody_comes_back_the_death_is_told(student: Student) -> None:
    first, second = student.worker(), student.worker("dies over its word")
    with pytest.raises(PeerDied, match=f"producer pid {second.pid} died while writing it"):
        student.turns.teachers_sleep()
    first.kill()


def test_an_order_that_was_fulfilled_is_passed_over(student: Student) -> None:
    """Its worker died between its word and the end of the message."""
    orders = RequestRing.attach(student.requests.handle, role="consumer")
    worker = HiddenRing.attach(student.ring.handle, role="producer")
    student.sender.send(SleepOrder.encode(0))
    with worker.reserve(0) as slot:
        slot.buffer(0)
    order = SleepOrder.of(orders.lease(timeout_s=10.0))
    assert order is not None
    assert order.fulfil(worker, timeout_s=10.0)
    assert orders.try_receive() is None


def test_who_sleeps_leaves_with_the_student(student: Student) -> None:
    workers = [student.worker() for _ in range(2)]
    student.turns.teachers_sleep()
    student.leave()
    for worker in workers:
        worker.line()
        assert worker.line() == "left asleep"
        assert worker.join() == 0
