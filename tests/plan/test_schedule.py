"""The simulation against schedules that one can work out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest

from kdflow.plan.schedule import Costs, Schedule, simulate, window_ends
from kdflow.training.turns import windows


def schedule(
    prefill: float,
    student: float,
    *,
    num_steps: int = 50,
    num_microbatches: int = 2,
    ranks: Sequence[int] = (0,),
    teachers: Sequence[int] = (1,),
    num_slots: int = 4,
    optimizer: float = 0.0,
    transfer: float = 0.0,
    turn: float | None = None,
) -> Schedule:
    costs = Costs(prefill, transfer, student / 4, student / 4, student / 2)
    steps = [[[costs] * len(ranks)] * num_microbatches] * num_steps
    return Schedule(steps, optimizer, ranks, {"": teachers}, num_slots, turn)


def test_the_slower_side_sets_the_pace() -> None:
    fast_teacher = simulate(schedule(1.0, 3.0, optimizer=0.5))
    assert fast_teacher.step_seconds[-1] == pytest.approx(2 * 3.0 + 0.5)
    assert fast_teacher.wait == pytest.approx(0.0, abs=0.01)
    assert fast_teacher.teacher_busy == pytest.approx(2 / 6.5, rel=0.05)
    slow_teacher = simulate(schedule(4.0, 3.0))
    assert slow_teacher.step_seconds[-1] == pytest.approx(2 * 4.0)
    assert slow_teacher.teacher_busy == pytest.approx(1.0, abs=0.02)
    assert slow_teacher.wait == pytest.approx(0.25, abs=0.02)


def test_one_slot_is_held_through_the_loss_alone() -> None:
    # The teacher prefills during the half of the backward and the quarter of the forward.
    assert simulate(schedule(3.0, 4.0, num_slots=1)).step_seconds[-1] == pytest.approx(2 * 4.0)
    assert simulate(schedule(5.0, 4.0, num_slots=1)).step_seconds[-1] == pytest.approx(2 * (1.0 + 5.0))


def test_a_shared_device_does_the_sum_of_both() -> None:
    shared = simulate(schedule(3.0, 5.0, ranks=(0,), teachers=(0,)))
    assert shared.seconds == pytest.approx(50 * 2 * 8.0, rel=0.02)
    assert shared.step_seconds[10] == pytest.approx(16.0, rel=0.05)


@pytest.mark.parametrize(("num_teachers", "per_step"), [(1, 8.0), (2, 4.0), (4, 3.0)])
def test_four_ranks_need_their_teachers(num_teachers: int, per_step: float) -> None:
    teachers = tuple(range(4, 4 + num_teachers))
    found = simulate(schedule(1.0, 1.5, ranks=(0, 1, 2, 3), teachers=teachers, num_microbatches=2))
    assert sum(found.step_seconds[10:]) / 40 == pytest.approx(per_step, rel=0.05)


def test_ranks_wait_for_the_slowest_of_them() -> None:
    quick, slow = Costs(0.1, 0.0, 0.5, 0.5, 1.0), Costs(0.1, 0.0, 1.0, 1.0, 2.0)
    found = simulate(Schedule([[[quick, slow]]] * 10, 0.0, (0, 1), {"": (2,)}, 2))
    assert found.step_seconds[-1] == pytest.approx(4.0)
    assert found.student_busy == pytest.approx(0.75, abs=0.02)


def test_teachers_work_at_the_same_time_each_on_its_own() -> None:
    """The slow one has a microbatch in three."""
    quick, slow = (Costs(seconds, 0.0, 0.5, 0.5, 1.0, name) for name, seconds in (("quick", 1.0), ("slow", 9.0)))
    devices = {"quick": (1,), "slow": (2,)}
    found = simulate(Schedule([[[slow], [quick], [quick]]] * 40, 0.0, (0,), devices, 6))
    assert found.seconds / 40 == pytest.approx(9.0, rel=0.05)
    assert found.busy["slow"] == pytest.approx(1.0, abs=0.05)
    assert found.busy["quick"] == pytest.approx(2 / 9, abs=0.03)
    both = simulate(Schedule([[[slow], [quick], [quick]]] * 40, 0.0, (0,), {"quick": (1,), "slow": (2, 3)}, 6))
    assert both.seconds / 40 == pytest.approx(6.0, rel=0.05)


def test_a_long_way_needs_slots() -> None:
    """Rows that travel for five times a microbatch."""
    few = simulate(schedule(0.1, 1.0, transfer=5.0, num_slots=2))
    many = simulate(schedule(0.1, 1.0, transfer=5.0, num_slots=8))
    assert many.step_seconds[-1] == pytest.approx(2.0)
    assert few.step_seconds[-1] > 2 * many.step_seconds[-1]


@pytest.mark.parametrize("num_slots", [1, 4])
def test_students_without_a_teacher_never_wait(num_slots: int) -> None:
    quick, slow = (Costs(0.0, 0.0, s / 4, s / 4, s / 2, teacher=None) for s in (2.0, 3.0))
    found = simulate(Schedule([[[quick, slow]] * 2] * 10, 0.5, (0, 1), {}, num_slots), warm_up_steps=2)
    assert found.step_seconds == pytest.approx([2 * 3.0 + 0.5] * 8)
    assert found.student_busy == pytest.approx((5.0 / 6.0 * 6.0 + 0.5) / 6.5)
    assert (found.wait, found.teacher_busy, found.busy) == (0.0, 0.0, {})


def test_hundreds_of_devices() -> None:
    found = simulate(
        schedule(1.0, 4.0, num_steps=4, ranks=tuple(range(256)), teachers=tuple(range(256, 320)), num_slots=4)
    )
    assert found.step_seconds[-1] == pytest.approx(8.0, rel=0.05)
    assert found.teacher_busy > 0.8


def test_in_turns_each_side_has_the_device_alone() -> None:
    """Two steps of two microbatches in a window: wake, prefill four, sleep, train through four."""
    one = {"num_steps": 6, "num_slots": 5, "teachers": (0,), "turn": 0.5, "optimizer": 1.0}
    found = simulate(schedule(1.0, 3.0, **one))
    assert found.seconds == pytest.approx(3 * (0.5 + 4 * 1.0 + 0.5 + 4 * 3.0 + 2 * 1.0))
    assert found.wait == pytest.approx(5 / 19)
    assert found.teacher_busy == pytest.approx(4 / 19)
    two = simulate(schedule(1.0, 3.0, **{**one, "ranks": (0, 1), "teachers": (0, 1)}))
    assert two.seconds == pytest.approx(found.seconds)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, 7, 100])
@pytest.mark.parametrize("sizes", [[2, 2, 2], [5], [1, 6, 1, 3], [4, 4, 1, 1, 9, 2]])
def test_windows_are_those_of_a_run(sizes: list[int], num_slots: int) -> None:
    pieces = [[object()] * size for size in sizes]
    ends = list(itertools.accumulate(len(window) for window in windows(pieces, num_slots)))
    assert window_ends(sizes, num_slots) == ends
