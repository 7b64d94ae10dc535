"""Which samples make which microbatch of which step and rank: a pure function of the seed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kdflow.data.balance import balance
from kdflow.data.mixture import Mixture
from kdflow.errors import DataError
from kdflow.types import Microbatch, Sample


@dataclass(frozen=True)
class Step:
    """One optimizer step of one rank.

    Attributes:
        index: Counts from 0 over the run.
        epoch: Samples drawn before it over all that there are, rounded down: of one source its passes.
        microbatches: As many on every rank. Where samples are too few, a rank gets one without
            loss rows: it takes part in the collectives and adds nothing.
        num_loss_tokens: Of the whole step, over all ranks and microbatches.
        num_tokens: The same for all tokens.
        loss_tokens: Those of num_loss_tokens that learn from each teacher, by its name.
    """

    index: int
    epoch: int
    microbatches: tuple[Microbatch, ...]
    num_loss_tokens: int
    num_tokens: int
    loss_tokens: Mapping[str, int]


def step_cost(length: int) -> float:
    """What a sample costs, in tokens of a short one: attention grows with the square of its length.

    A causal layer of width H multiplies 24H^2 times per token and 2HL more for attention over a sample of L tokens, so
    both are equal at L = 12H; H = 2048 is taken for all models. At 1024 tokens attention is 4%.
    """
    return length * (1 + length / (12 * 2048))


def pack_step(
    samples: Sequence[Sample],
    *,
    tokens_per_microbatch: int,
    rank: int = 0,
    num_ranks: int = 1,
    index: int = 0,
    epoch: int = 0,
) -> Step:
    """Cuts the samples of a step into equally many microbatches for every rank, each of one teacher's samples.

    What is balanced is `step_cost` of the student's tokens, over all microbatches of all ranks. They are dealt out in
    the order of their cost, so that what ranks do at the same time is most alike. There are as few as can be with at
    most `tokens_per_microbatch` tokens in each, the student's and the teacher's counted each by themselves.

    Raises:
        DataError: no sample has a token in the loss.
    """
    assert all(s.longest <= tokens_per_microbatch for s in samples)
    num_loss_tokens = sum(s.num_loss_tokens for s in samples)
    if num_loss_tokens == 0:
        ids = [s.sample_id for s in samples]
        raise DataError(f"data: step {index + 1} has no token in the loss: look at the rows {ids}")
    groups = _by_teacher(samples)
    bins = _fill_bins(list(groups.values()), tokens_per_microbatch, num_ranks)
    filler = Microbatch.pack([min(samples, key=len)]).without_loss()
    return Step(
        index=index,
        epoch=epoch,
        microbatches=tuple(Microbatch.pack(b) if b else filler for b in bins[rank::num_ranks]),
        num_loss_tokens=num_loss_tokens,
        num_tokens=sum(len(s) for s in samples),
        loss_tokens={name: sum(s.num_loss_tokens for s in group) for name, group in groups.items()},
    )


_Bin = list[Sample]


def _by_teacher(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """In the order of their names, so that the order of the samples decides nothing."""
    names = sorted({s.teacher_name for s in samples})
    return {name: [s for s in samples if s.teacher_name == name] for name in names}


def _fill_bins(groups: Sequence[Sequence[Sample]], budget: int, num_ranks: int) -> list[_Bin]:
    """A multiple of `num_ranks` bins, the costliest first, none of which holds samples of two groups."""
    fewest = [math.ceil(_longer_side(group) / budget) for group in groups]
    while True:
        counts = _share_out(groups, fewest, math.ceil(sum(fewest) / num_ranks) * num_ranks)
        filled = [_balanced(group, count) for group, count in zip(groups, counts, strict=True)]
        overfull = [any(_longer_side(chosen) > budget for chosen in bins) for bins in filled]
        if not any(overfull):
            return list(heapq.merge(*filled, key=_cost, reverse=True))
        fewest = [n + 1 if over else low for over, n, low in zip(overfull, counts, fewest, strict=True)]


def _share_out(groups: Sequence[Sequence[Sample]], fewest: Sequence[int], total: int) -> list[int]:
    """Bins of each group: what it needs, and of the rest one after another to where bins are costliest."""
    counts = list(fewest)
    costs = [_cost(group) for group in groups]
    for _ in range(total - sum(counts)):
        # One bin for each sample is all that helps; where all have that, the first group takes bins that stay empty.
        loads = [c / n if n < len(g) else 0.0 for c, n, g in zip(costs, counts, groups, strict=True)]
        counts[loads.index(max(loads))] += 1
    return counts


def _balanced(samples: Sequence[Sample], count: int) -> list[_Bin]:
    return [[samples[i] for i in chosen] for chosen in balance([step_cost(len(s)) for s in samples], count)]


def _cost(samples: Sequence[Sample]) -> float:
    return sum(step_cost(len(s)) for s in samples)


def _longer_side(samples: Sequence[Sample]) -> int:
    """Tokens, the student's or the teacher's."""
    return max(sum(len(s) for s in samples), sum(len(s.for_teacher()) for s in samples))


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
    """Steps `start` to `num_steps` of one rank, in the order that `Mixture` gives the samples.

    The samples of a step depend on the seed alone, not on ranks or microbatches, nor on the steps before it.
    """
    mixture = Mixture.of(samples)
    order = mixture.order(seed)
    for index in range(start, num_steps):
        first = index * samples_per_step
        yield pack_step(
            [mixture.at(order(position)) for position in range(first, first + samples_per_step)],
            tokens_per_microbatch=tokens_per_microbatch,
            rank=rank,
            num_ranks=num_ranks,
            index=index,
            epoch=first // len(mixture),
        )
