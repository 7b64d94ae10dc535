"""What a run does, one after another: evaluations, optimizer steps and checkpoints.

It is an iterator of plain descriptions, so the hidden states of what comes can be asked for
while what is there is worked on, across the border between training and evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        loss_tokens: those of them that each teacher is asked about, by its name.
    """

    num_steps_done: int
    microbatches: tuple[Microbatch, ...]
    num_loss_tokens: int
    loss_tokens: Mapping[str, int]


@dataclass(frozen=True)
class Save:
    """A checkpoint, after the evaluation of the same step where there is one.

    Attributes:
        num_steps_done: optimizer steps before it.
        due: whether it is saved in any case, or only where that evaluation was the best so far.
        microbatches: none.
    """

    num_steps_done: int
    due: bool
    microbatches: tuple[Microbatch, ...] = ()


def plan(
    config: RunConfig,
    train: Dataset,
    held_out: Dataset | None,
    *,
    rank: int,
    num_ranks: int,
    start: int = 0,
) -> Iterator[Step | Evaluation | Save]:
    """The work of a rank from step `start` on: an evaluation, then steps with evaluations and checkpoints between."""
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
            yield Evaluation(num_steps_done, held.microbatches, held.num_loss_tokens, held.loss_tokens)

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

        def is_due(every: int, done: int = done) -> bool:
            return done == training.num_steps or (every > 0 and done % every == 0)

        if is_due(training.eval_every):
            yield from evaluation(done)
        if is_due(training.save_every) or is_due(training.eval_every):
            yield Save(done, due=is_due(training.save_every))
