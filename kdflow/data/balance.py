"""Samples into equally loaded bins: the largest differencing method of Karmarkar and Karp."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def balance(loads: Sequence[float], num_bins: int) -> list[list[int]]:
    """Indices of `loads` in `num_bins` bins of near-equal sums, the heaviest first; bins may be empty.

    Every load begins as a partition of its own, with all other bins empty. Again and again the two partitions with the
    largest differences between their bins are put together, heavy bins to light ones, until one is left (Karmarkar and
    Karp 1982, for several bins). A load is so placed against others of its size, where the greedy way, longest first
    into the lightest bin, looks at what is there alone.
    """
    # Spread of a partition, its number, and its bins from the lightest one on: sum and indices.
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for number, load in enumerate(loads):
        heap.append((-load, number, [(0.0, [])] * (num_bins - 1) + [(load, [number])]))
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        joined = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        joined.sort(key=lambda part: part[0])
        heapq.heappush(heap, (joined[0][0] - joined[-1][0], number, joined))
        number += 1
    return [indices for _, indices in reversed(heap[0][2])]
