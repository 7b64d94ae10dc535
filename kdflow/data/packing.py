"""Which samples make which microbatch of which step and rank: a pure function of the seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    """

    index: int
    epoch: int
    microbatches: tuple[Microbatch, ...]
    num_loss_tokens: int
    num_tokens: int


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
    """Cuts the samples of a step into equally many microbatches for every rank.

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
    num_tokens = sum(len(s) for s in samples)
    most = max(num_tokens, sum(len(s.for_teacher()) for s in samples))
    costs = [step_cost(len(s)) for s in samples]
    per_rank = math.ceil(most / (num_ranks * tokens_per_microbatch))
    while True:
        bins = [[samples[i] for i in chosen] for chosen in balance(costs, per_rank * num_ranks)]
        if all(_fits(chosen, tokens_per_microbatch) for chosen in bins):
            break
        per_rank += 1
    filler = Microbatch.pack([min(samples, key=len)]).without_loss()
    return Step(
        index=index,
        epoch=epoch,
        microbatches=tuple(Microbatch.pack(b) if b else filler for b in bins[rank::num_ranks]),
        num_loss_tokens=num_loss_tokens,
        num_tokens=num_tokens,
    )


def _fits(samples: Sequence[Sample], budget: int) -> bool:
    return sum(len(s) for s in samples) <= budget and sum(len(s.for_teacher()) for s in samples) <= budget


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
