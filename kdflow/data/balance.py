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
    # Spread of a partition, its number, and those of its bins that hold anything, from the lightest one on.
    heap: list[tuple[float, int, list[_Bin]]] = [(-load, i, [(load, [i])]) for i, load in enumerate(loads)]
    heapq.heapify(heap)
    for number in range(len(loads), 2 * len(loads) - 1):
        _, _, first = heapq.heappop(heap)
        _, _, second = heapq.heappop(heap)
        joined = _join(first, second, num_bins)
        lightest = joined[0][0] if len(joined) == num_bins else 0.0
        heapq.heappush(heap, (lightest - joined[-1][0], number, joined))
    filled = [indices for _, indices in reversed(heap[0][2])]
    return filled + [[] for _ in range(num_bins - len(filled))]


_Bin = tuple[float, list[int]]


def _join(first: list[_Bin], second: list[_Bin], num_bins: int) -> list[_Bin]:
    """The heaviest bin of one to the lightest of the other, and so on. Empty bins are the lightest, and left out."""
    heaviest_first = second[::-1]
    num_empty = num_bins - len(first)
    met = heaviest_first[num_empty:]
    joined = heaviest_first[:num_empty]
    joined += [(a + b, x + y) for (a, x), (b, y) in zip(first, met, strict=False)]
    joined += first[len(met) :]
    joined.sort(key=lambda part: part[0])
    return joined
