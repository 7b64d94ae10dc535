"""What a run does, one after another: evaluations and optimizer steps.

It is an iterator of plain descriptions, so the hidden states of what comes can be asked for
while what is there is worked on, across the border between training and evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from kdflow.config import RunConfig
from kdflow.data import Dataset, Step, pack_step, training_steps
from kdflow.types import Microbatch


@dataclass(frozen=True)
class Evaluation:
    """One pass over the held-out samples, on one rank.

    Attributes:
        num_steps_done: optimizer steps before it.
        microbatches: as many on every rank.
        num_loss_tokens: over all ranks.
    """

    num_steps_done: int
    microbatches: tuple[Microbatch, ...]
    num_loss_tokens: int


def plan(
    config: RunConfig,
    train: Dataset,
    held_out: Dataset | None,
    *,
    rank: int,
    num_ranks: int,
    start: int = 0,
) -> Iterator[Step | Evaluation]:
    """The work of a rank from step `start` on, first and last an evaluation."""
    training = config.training
    if held_out is not None:
        held = pack_step(
            held_out.samples,
            tokens_per_microbatch=training.tokens_per_microbatch,
            rank=rank,
            num_ranks=num_ranks,
        )

    def evaluation(num_steps_done: int) -> Iterator[Evaluation]:
        if held_out is not None:
            yield Evaluation(num_steps_done, held.microbatches, held.num_loss_tokens)

    yield from evaluation(start)
    for step in training_steps(
        train.samples,
        num_steps=training.num_steps,
        samples_per_step=training.samples_per_step,
        tokens_per_microbatch=training.tokens_per_microbatch,
        seed=config.seed,
        rank=rank,
        num_ranks=num_ranks,
        start=start,
    ):
        yield step
        done = step.index + 1
        every = training.eval_every
        if done == training.num_steps or (every and done % every == 0):
            yield from evaluation(done)
