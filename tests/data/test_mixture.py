"""The order of several sources: exact shares, no sample twice in an epoch, any place found by its number."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdflow.data import Mixture, training_steps
from kdflow.data.mixture import CYCLE, Order, apportion
from kdflow.types import Sample


def make(lengths: list[int], first_id: int = 0) -> list[Sample]:
    return [Sample(np.full(n, first_id + i, np.int32), np.arange(n) > 0, first_id + i) for i, n in enumerate(lengths)]


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 9)), min_size=1, max_size=4), st.integers(0, 3 * CYCLE))
@settings(max_examples=40, deadline=None)
def test_any_place_is_found_by_its_number(parts: list[tuple[int, float]], start: int) -> None:
    sizes, weights = [n for n, _ in parts], [w for _, w in parts]
    shares = apportion(weights, CYCLE)
    straight = Order(sizes, shares, seed=7)
    straight_on = [straight(p) for p in range(start, start + 50)]
    backwards = [Order(sizes, shares, seed=7)(p) for p in reversed(range(start, start + 50))]
    assert straight_on == backwards[::-1]


def test_shares_are_exact_and_every_epoch_visits_all() -> None:
    sizes, shares = [300, 7], apportion([0.75, 0.25], CYCLE)
    order = Order(sizes, shares, seed=1)
    places = [order(p) for p in range(2 * CYCLE)]
    assert Counter(source for source, _ in places) == {0: 15_000, 1: 5_000}
    for source, size in enumerate(sizes):
        drawn = [index for s, index in places if s == source]
        epochs = [drawn[i : i + size] for i in range(0, len(drawn) - size + 1, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs[:5]}) == 5, "each epoch has an order of its own"
    for first in range(0, CYCLE, 1000):  # within a cycle as by chance: 7 standard deviations
        assert abs(sum(s for s, _ in places[first : first + 1000]) - 250) < 100


def test_one_source_goes_by_its_epochs() -> None:
    order = Order([10], [CYCLE], seed=3)
    expected = [i for epoch in range(3) for i in np.random.default_rng((3, epoch)).permutation(10)]
    assert [order(p) for p in range(30)] == [(0, i) for i in expected]


@pytest.mark.parametrize(
    "weights, total, parts", [([1, 1, 1], 10, [4, 3, 3]), ([1e-9, 1], 100, [1, 99]), ([5], 7, [7])]
)
def test_apportion(weights: list[float], total: int, parts: list[int]) -> None:
    assert apportion(weights, total) == parts


def test_steps_of_a_mixture_can_start_anywhere_and_hold_for_all_ranks() -> None:
    mixture = Mixture([make([3, 5, 8] * 4), make([4] * 5, 100)], [1.0, 2.0])
    assert len(mixture) == 17
    assert mixture[-1].sample_id == 104
    assert [s.sample_id for s in mixture[10:14]] == [10, 11, 100, 101]

    def ids(rank: int, num_ranks: int, start: int = 0) -> list[list[int]]:
        steps = training_steps(
            mixture,
            num_steps=30,
            samples_per_step=6,
            tokens_per_microbatch=16,
            seed=2,
            rank=rank,
            num_ranks=num_ranks,
            start=start,
        )
        return [[i for m in step.microbatches for i in m.sample_ids] for step in steps]

    whole = ids(0, 1)
    assert ids(0, 1, start=17) == whole[17:]
    both = [sorted(a + b) for a, b in zip(ids(0, 2), ids(1, 2), strict=True)]
    assert both == [sorted(step) for step in whole]
    assert 0.5 < np.mean([i >= 100 for step in whole for i in step]) < 0.8
