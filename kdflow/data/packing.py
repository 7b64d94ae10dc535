"""Which samples make which microbatch of which step and rank: a pure function of the seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kdflow.types import Microbatch, Sample


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank.

    Attributes:
        index: Counts from 0 over the run.
        epoch: Pass over the data that its first sample belongs to.
        microbatches: As many on every rank. Where samples are too few, a rank gets one without
            loss rows: it takes part in the collectives and adds nothing.
        num_loss_tokens: Of the whole step, over all ranks and microbatches.
        num_tokens: The same for all tokens.
    """

    index: int
    epoch: int
    microbatches: tuple[Microbatch, ...]
    num_loss_tokens: int
    num_tokens: int


def pack_step(
    samples: Sequence[Sample],
    *,
    tokens_per_microbatch: int,
    rank: int = 0,
    num_ranks: int = 1,
    index: int = 0,
    epoch: int = 0,
) -> Step:
    """Cuts the samples of a step into equally many microbatches for every rank.

    Longest first into the lightest microbatch, which keeps ranks level; the number of
    microbatches grows until each holds at most `tokens_per_microbatch` tokens.
    """
    assert all(len(s) <= tokens_per_microbatch for s in samples)
    assert len(samples) >= num_ranks
    num_tokens = sum(len(s) for s in samples)
    per_rank = max(1, math.ceil(num_tokens / (num_ranks * tokens_per_microbatch)))
    while True:
        bins = _balance(samples, per_rank * num_ranks)
        if all(sum(len(s) for s in b) <= tokens_per_microbatch for b in bins):
            break
        per_rank += 1
    filler = Microbatch.pack([min(samples, key=len)]).without_loss()
    return Step(
        index=index,
        epoch=epoch,
        microbatches=tuple(Microbatch.pack(b) if b else filler for b in bins[rank::num_ranks]),
        num_loss_tokens=sum(s.num_loss_tokens for s in samples),
        num_tokens=num_tokens,
    )


def _balance(samples: Sequence[Sample], num_bins: int) -> list[list[Sample]]:
    """`num_bins` lists of near-equal token counts, heaviest first."""
    bins: list[list[Sample]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for sample in sorted(samples, key=lambda s: (-len(s), s.sample_id)):
        lightest = loads.index(min(loads))
        bins[lightest].append(sample)
        loads[lightest] += len(sample)
    order = sorted(range(num_bins), key=lambda i: -loads[i])
    return [bins[i] for i in order]


def training_steps(
    samples: Sequence[Sample],
    *,
    num_steps: int,
    samples_per_step: int,
    tokens_per_microbatch: int,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
    start: int = 0,
) -> Iterator[Step]:
    """Steps `start` to `num_steps` of one rank, epochs shuffled one by one.

    The samples of a step depend on the seed alone, not on ranks or microbatches.
    """
    orders: dict[int, np.ndarray] = {}
    for index in range(start, num_steps):
        picked = []
        first = index * samples_per_step
        for position in range(first, first + samples_per_step):
            epoch, offset = divmod(position, len(samples))
            if epoch not in orders:
                orders = {e: o for e, o in orders.items() if e >= epoch - 1}
                orders[epoch] = np.random.default_rng((seed, epoch)).permutation(len(samples))
            picked.append(samples[orders[epoch][offset]])
        yield pack_step(
            picked,
            tokens_per_microbatch=tokens_per_microbatch,
            rank=rank,
            num_ranks=num_ranks,
            index=index,
            epoch=first // len(samples),
        )
