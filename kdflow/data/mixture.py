"""Samples of several sources in one order, any place of which is found without the places before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdflow.data.store import SampleView
from kdflow.types import Sample

# Draws after which every source has had its exact share; weights are rounded to as many parts.
CYCLE = 10_000


class Mixture(SampleView):
    """Sources one after another, and the weights by which a run draws from them.

    Args:
        sources: each not empty.
        weights: more than 0; they need not add up to 1.
    """

    def __init__(self, sources: Sequence[Sequence[Sample]], weights: Sequence[float]) -> None:
        assert len(sources) == len(weights) > 0
        assert all(len(source) for source in sources)
        assert all(weight > 0 for weight in weights)
        self._sources = tuple(sources)
        self._ends = np.cumsum([len(source) for source in sources])
        self._shares = apportion(weights, CYCLE)

    @staticmethod
    def of(samples: Sequence[Sample]) -> Mixture:
        return samples if isinstance(samples, Mixture) else Mixture([samples], [1.0])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def get(self, index: int) -> Sample:
        source = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[source][index - int(self._ends[source]) + len(self._sources[source])]

    def order(self, seed: int) -> Order:
        return Order([len(source) for source in self._sources], self._shares, seed)

    def at(self, place: tuple[int, int]) -> Sample:
        """The sample at (source, index)."""
        source, index = place
        return self._sources[source][index]


class Order:
    """Which sample is the n-th of a run: a function of n and the seed alone.

    Draws come in cycles of CYCLE, in each of which source i has `shares[i]`, at places that are shuffled anew; so the
    n-th draw is a known draw of its source. Each source goes through its samples in an order of its own in each of its
    epochs, one epoch after another. What is kept are the orders of the current cycle and epochs, 8 bytes a sample.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[int], seed: int) -> None:
        self._sizes = tuple(sizes)
        self._shares = np.asarray(shares, np.int64)
        self._seed = seed
        self._cycle: tuple[int, np.ndarray, np.ndarray] | None = None
        self._epochs: list[tuple[int, np.ndarray] | None] = [None] * len(sizes)

    def __call__(self, position: int) -> tuple[int, int]:
        """(source, index) of the draw at `position`."""
        source, draw = self._draw(position)
        epoch, offset = divmod(draw, self._sizes[source])
        kept = self._epochs[source]
        if kept is None or kept[0] != epoch:
            kept = (epoch, np.random.default_rng((self._seed, epoch, source)).permutation(self._sizes[source]))
            self._epochs[source] = kept
        return source, int(kept[1][offset])

    def _draw(self, position: int) -> tuple[int, int]:
        """The source, and how many draws it has had before."""
        if len(self._sizes) == 1:
            return 0, position
        cycle, offset = divmod(position, int(self._shares.sum()))
        if self._cycle is None or self._cycle[0] != cycle:
            # Sources count from 0, so their number is a stream of its own.
            rng = np.random.default_rng((self._seed, cycle, len(self._sizes)))
            places = rng.permutation(np.repeat(np.arange(len(self._shares)), self._shares))
            earlier = np.empty_like(places)
            for source, share in enumerate(self._shares):
                earlier[places == source] = np.arange(share)
            self._cycle = (cycle, places, earlier)
        _, places, earlier = self._cycle
        source = int(places[offset])
        return source, cycle * int(self._shares[source]) + int(earlier[offset])


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """`total` divided in proportion to the weights, the largest remainders rounded up.

    Each gets at least one, of which the sum may be more than `total`.
    """
    exact = np.asarray(weights, np.float64) / sum(weights) * total
    parts = np.maximum(np.floor(exact).astype(np.int64), 1)
    for index in np.argsort(parts - exact, kind="stable")[: max(total - int(parts.sum()), 0)]:
        parts[index] += 1
    return parts.tolist()
