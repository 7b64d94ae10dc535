"""How level the bins are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kdflow.data import balance


def greedy(loads: Sequence[float], num_bins: int) -> list[float]:
    """Longest first into the lightest bin: the usual way, to compare with."""
    sums = [0.0] * num_bins
    for load in sorted(loads, reverse=True):
        sums[sums.index(min(sums))] += load
    return sums


def sums(loads: Sequence[float], bins: list[list[int]]) -> list[float]:
    return [sum(loads[i] for i in chosen) for chosen in bins]


@given(st.lists(st.integers(1, 999), min_size=1, max_size=30), st.integers(1, 6))
@settings(max_examples=80, deadline=None)
def test_every_load_is_in_one_bin(loads: list[int], num_bins: int) -> None:
    bins = balance(loads, num_bins)
    assert len(bins) == num_bins
    assert sorted(itertools.chain(*bins)) == list(range(len(loads)))
    found = sums(loads, bins)
    assert found == sorted(found, reverse=True)
    # No worse than one load over the mean, as the greedy way is.
    assert max(found) <= sum(loads) / num_bins + max(loads)


def test_two_bins_as_karmarkar_and_karp_have_it() -> None:
    # Differences 8-7=1, 6-5=1, 4, 1-1=0, 4-0=4 ... leave 2; the greedy way leaves 4.
    assert [sum([8, 7, 6, 5, 4][i] for i in chosen) for chosen in balance([8, 7, 6, 5, 4], 2)] == [16, 14]
    assert sorted(greedy([8, 7, 6, 5, 4], 2)) == [13, 17]


def test_more_level_than_the_greedy_way() -> None:
    """Lengths as conversations have them (log-normal), 2 to 8 bins of 4 to 10 samples each.

    With fewer the longest sample decides, and both ways are alike.
    """
    rng = np.random.default_rng(0)
    excess: dict[str, list[float]] = {"ours": [], "greedy": []}
    for _ in range(300):
        num_bins = int(rng.integers(2, 9))
        loads = np.minimum(rng.lognormal(5.3, 0.8, num_bins * int(rng.integers(4, 11))), 1024).round().tolist()
        mean = sum(loads) / num_bins
        excess["ours"].append(max(sums(loads, balance(loads, num_bins))) / mean - 1)
        excess["greedy"].append(max(greedy(loads, num_bins)) / mean - 1)
    assert np.mean(excess["ours"]) < 0.75 * np.mean(excess["greedy"])
