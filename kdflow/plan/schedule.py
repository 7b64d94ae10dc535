"""A run's schedule, simulated: ranks in lockstep, teachers that prefill ahead or in turns, rings of so many slots.

A rank asks for its next microbatch when a slot is free, as transport/channel.py does; teachers take the oldest request;
ranks meet at the end of each microbatch, whose backward reduces or gathers over all of them, and at the optimizer.
In turns they ask for a window at once, as training/turns.py does, and compute when all of its rows are there. Several
jobs on one device get equal shares of it.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Costs:
    """Seconds of one rank's microbatch, each alone on its device."""

    prefill_s: float
    transfer_s: float
    forward_s: float
    loss_s: float
    backward_s: float
    teacher: str | None = ""  # who prefills it; None: nobody, and it needs no rows


@dataclass(frozen=True)
class Schedule:
    """Steps of microbatches of ranks, and who computes where.

    Attributes:
        optimizer_s: of each step, every rank.
        student_devices: numbers of the devices; the same number means the same device.
        teacher_devices: of each teacher's workers, by its name; empty where students learn from text alone.
        num_slots: of each rank's ring.
        turn_s: seconds in which teachers fall asleep, and in which they wake; None where they never do.
    """

    steps: Sequence[Sequence[Sequence[Costs]]]
    optimizer_s: float
    student_devices: Sequence[int]
    teacher_devices: Mapping[str, Sequence[int]]
    num_slots: int
    turn_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        seconds: from the first step's begin to the last one's end, and by step.
        busy: share of the time in which a teacher prefills, mean over its workers, by name.
        student_busy: the same of students that compute.
        wait: share of the time in which a rank stands still for want of rows, mean over ranks.
    """

    seconds: float
    step_seconds: tuple[float, ...]
    busy: Mapping[str, float]
    student_busy: float
    wait: float

    @property
    def teacher_busy(self) -> float:
        """Of the busiest."""
        return max(self.busy.values(), default=0.0)


class _Clock:
    """Jobs on devices; a device's jobs share it equally."""

    def __init__(self) -> None:
        self.now = 0.0
        self._jobs: dict[int, list[list]] = {}  # device -> [seconds left, number, what then]
        self._since: dict[int, float] = {}
        self._version: dict[int, int] = {}
        self._events: list[tuple[float, int, int, int]] = []  # when, order, device (or -1), version
        self._later: dict[int, Callable[[], None]] = {}
        self._count = 0

    def start(self, device: int, seconds: float, then: Callable[[], None]) -> None:
        self._settle(device)
        self._count += 1
        self._jobs.setdefault(device, []).append([seconds, self._count, then])
        self._predict(device)

    def after(self, seconds: float, then: Callable[[], None]) -> None:
        """Takes time, but no device."""
        self._count += 1
        self._later[self._count] = then
        heapq.heappush(self._events, (self.now + seconds, self._count, -1, self._count))

    def run(self) -> None:
        while self._events:
            when, _, device, version = heapq.heappop(self._events)
            if device == -1:
                self.now = when
                self._later.pop(version)()
            elif self._version[device] == version:
                self.now = when
                self._settle(device)
                job = min(self._jobs[device])
                self._jobs[device].remove(job)
                self._predict(device)
                job[2]()

    def _settle(self, device: int) -> None:
        jobs = self._jobs.get(device, [])
        passed = (self.now - self._since.get(device, self.now)) / max(1, len(jobs))
        for job in jobs:
            job[0] -= passed
        self._since[device] = self.now

    def _predict(self, device: int) -> None:
        self._version[device] = self._version.get(device, 0) + 1
        if jobs := self._jobs[device]:
            self._count += 1
            when = self.now + max(0.0, min(jobs)[0]) * len(jobs)
            heapq.heappush(self._events, (when, self._count, device, self._version[device]))


class _Simulation:
    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._clock = _Clock()
        self._num_ranks = len(schedule.student_devices)
        self._work = [microbatch for step in schedule.steps for microbatch in step]
        self._step_ends = set()
        done = 0
        for step in schedule.steps:
            done += len(step)
            self._step_ends.add(done - 1)
        self._queues: dict[str, deque[tuple[int, int]]] = {name: deque() for name in schedule.teacher_devices}
        self._idle = {name: list(devices) for name, devices in schedule.teacher_devices.items()}
        self._asked = 0  # microbatches
        self._missing = 0  # rows of a window
        sizes = [len(step) for step in schedule.steps]
        self._windows = deque(window_ends(sizes, schedule.num_slots) if schedule.turn_s is not None else ())
        self._ready: set[tuple[int, int]] = set()
        self._waiting: dict[tuple[int, int], float] = {}
        self._turned = 0.0  # when the window's turn began
        self._at = 0  # the microbatch under way
        self._left = 0  # ranks still in it
        self._unread = 0  # ranks whose slot it still holds
        self.student_s = self.wait_s = 0.0
        self.prefill_s = dict.fromkeys(schedule.teacher_devices, 0.0)
        self.step_ends: list[tuple[float, ...]] = []
        self._note_end()

    def run(self) -> None:
        self._ask_ahead(0)
        self._begin()
        self._clock.run()

    def _ask_ahead(self, num_read: int) -> None:
        if self._schedule.turn_s is None:
            self._ask(min(num_read + self._schedule.num_slots, len(self._work)))

    def _ask(self, end: int) -> None:
        """All ranks at once, so their requests take turns."""
        for index in range(self._asked, end):
            for rank in range(self._num_ranks):
                teacher = self._work[index][rank].teacher
                if teacher is None:
                    self._ready.add((rank, index))
                else:
                    self._queues[teacher].append((rank, index))
        self._asked = end
        for name in self._queues:
            self._serve(name)

    def _serve(self, name: str) -> None:
        idle, queue = self._idle[name], self._queues[name]
        while idle and queue:
            device, (rank, index) = idle.pop(0), queue.popleft()
            costs, start = self._work[index][rank], self._clock.now

            def done(device: int = device, key: tuple[int, int] = (rank, index), start: float = start) -> None:
                self.prefill_s[name] += self._clock.now - start
                idle.append(device)
                self._clock.after(self._work[key[1]][key[0]].transfer_s, lambda: self._arrive(key))
                self._serve(name)

            self._clock.start(device, costs.prefill_s, done)

    def _note_end(self) -> None:
        """Time and all sums at the end of a step."""
        self.step_ends.append((self._clock.now, self.student_s, self.wait_s, *self.prefill_s.values()))

    def _arrive(self, key: tuple[int, int]) -> None:
        self._ready.add(key)
        self._missing -= 1
        if self._schedule.turn_s is not None and not self._missing:
            self._clock.after(self._schedule.turn_s, self._train)
        if key in self._waiting:
            self.wait_s += self._clock.now - self._waiting.pop(key)
            self._rest(*key)

    def _begin(self) -> None:
        if self._at == len(self._work):
            return
        if self._schedule.turn_s is not None and self._at == self._asked:
            end = self._windows.popleft()
            self._missing, self._turned = (end - self._at) * self._num_ranks, self._clock.now
            self._clock.after(self._schedule.turn_s, lambda: self._ask(end))
        else:
            self._compute_all()

    def _train(self) -> None:
        """All teachers sleep."""
        self.wait_s += self._num_ranks * (self._clock.now - self._turned)
        self._compute_all()

    def _compute_all(self) -> None:
        self._left = self._unread = self._num_ranks
        for rank in range(self._num_ranks):
            self._compute(rank, self._work[self._at][rank].forward_s, lambda rank=rank: self._rows(rank))

    def _compute(self, rank: int, seconds: float, then: Callable[[], None]) -> None:
        start = self._clock.now

        def done() -> None:
            self.student_s += self._clock.now - start
            then()

        self._clock.start(self._schedule.student_devices[rank], seconds, done)

    def _rows(self, rank: int) -> None:
        key = (rank, self._at)
        if key in self._ready:
            self._rest(*key)
        else:
            self._waiting[key] = self._clock.now

    def _rest(self, rank: int, index: int) -> None:
        costs = self._work[index][rank]

        def read() -> None:
            """The loss has formed its gradients; the slot is free."""
            self._unread -= 1
            if not self._unread:
                self._ask_ahead(index + 1)
            self._compute(rank, costs.backward_s, self._meet)

        self._compute(rank, costs.loss_s, read)

    def _meet(self) -> None:
        """The last rank ends the microbatch, and with it a step's last one the step."""
        self._left -= 1
        if self._left:
            return
        if self._at in self._step_ends:
            self._left = self._num_ranks
            for rank in range(self._num_ranks):
                self._compute(rank, self._schedule.optimizer_s, self._end_step)
        else:
            self._next()

    def _end_step(self) -> None:
        self._left -= 1
        if not self._left:
            self._note_end()
            self._next()

    def _next(self) -> None:
        self._at += 1
        self._begin()


def window_ends(sizes: Sequence[int], num_slots: int) -> list[int]:
    """After which microbatch each window of turns ends: whole steps that the slots hold; a larger one in parts."""
    ends, start, done = [], 0, 0
    for size in sizes:
        if done > start and done + size - start > num_slots:
            ends.append(done)
            start = done
        done += size
        while done - start > num_slots:
            start += num_slots
            ends.append(start)
    return [*ends, done]


def simulate(schedule: Schedule, *, warm_up_steps: int = 0, tail_steps: int = 0) -> Outcome:
    """Times and shares of the steps between warm-up and tail; a job counts in the step in which it ends."""
    simulation = _Simulation(schedule)
    simulation.run()
    ends = simulation.step_ends[warm_up_steps : len(simulation.step_ends) - tail_steps]
    seconds, student_s, wait_s, *prefill_s = (last - first for first, last in zip(ends[0], ends[-1], strict=True))
    num_ranks, teachers = len(schedule.student_devices), schedule.teacher_devices.items()
    return Outcome(
        seconds=seconds,
        step_seconds=tuple(after[0] - before[0] for before, after in itertools.pairwise(ends)),
        busy={name: s / (len(devices) * seconds) for (name, devices), s in zip(teachers, prefill_s, strict=True)},
        student_busy=student_s / (num_ranks * seconds),
        wait=wait_s / (num_ranks * seconds),
    )
