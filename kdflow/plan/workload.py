"""The microbatches of some steps: those of the run's own data, or of samples that are all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kdflow.config import RunConfig
from kdflow.data import Step, apportion, load_datasets, pack_step, training_steps
from kdflow.modeling import load_tokenizer
from kdflow.types import Sample


@dataclass(frozen=True)
class Piece:
    """What one rank takes at a time; `teacher_lengths` are other ones where the teacher has a context of its own."""

    lengths: tuple[int, ...]
    num_rows: int
    teacher_lengths: tuple[int, ...]
    teacher_name: str = ""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Workload:
    """Steps of microbatches of ranks, and where their lengths come from."""

    steps: tuple[tuple[tuple[Piece, ...], ...], ...]
    source: str

    @property
    def num_tokens(self) -> int:
        return sum(piece.num_tokens for step in self.steps for ranks in step for piece in ranks)

    @property
    def most_tokens(self) -> int:
        return max(piece.num_tokens for step in self.steps for ranks in step for piece in ranks)

    @property
    def most_rows(self) -> int:
        return max(piece.num_rows for step in self.steps for ranks in step for piece in ranks)

    @property
    def num_microbatches(self) -> int:
        """Of the longest step."""
        return max(len(step) for step in self.steps)


def data_workload(
    config: RunConfig,
    num_steps: int,
    num_ranks: int,
    *,
    first_step: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> Workload:
    """The first steps of the run, tokenised and packed as the run does it.

    Args:
        say: told of data that is tokenised.

    Raises:
        ConfigError, DataError: the tokenizer or the data cannot be had here.
    """
    tokenizer, teachers = load_tokenizer(config.student.model), tuple(config.named_teachers())
    train, _ = load_datasets(config.data, tokenizer, config.seed, teachers, say=say)
    training = config.training

    def of_rank(rank: int) -> list[Step]:
        return list(
            training_steps(
                train.samples,
                num_steps=first_step + num_steps,
                samples_per_step=training.samples_per_step,
                tokens_per_microbatch=training.tokens_per_microbatch,
                seed=config.seed,
                rank=rank,
                num_ranks=num_ranks,
                start=first_step,
            )
        )

    names = ", ".join(item.source for item in config.data.train_sources())
    return Workload(_by_step([of_rank(rank) for rank in range(num_ranks)]), f"{names}, as the run packs it")


def uniform_workload(
    config: RunConfig, num_steps: int, num_ranks: int, *, tokens_per_sample: int, loss_share: float
) -> Workload:
    """Every sample has as many tokens, the last `loss_share` of them in the loss.

    Teachers have samples by the weights of their sources, equally many where rows name them.
    """
    mask = np.arange(tokens_per_sample) >= round((1 - loss_share) * tokens_per_sample)
    weights = dict.fromkeys(config.named_teachers(), 0.0)
    for item in config.data.train_sources():
        if item.teacher in weights:
            weights[item.teacher] += item.weight
    shares = apportion(
        [w if all(weights.values()) else 1.0 for w in weights.values()], config.training.samples_per_step
    )
    names = [name for name, share in zip(weights, shares, strict=True) for _ in range(share)]
    samples = [
        Sample(np.zeros(tokens_per_sample, np.int32), mask, i, teacher_name=name) for i, name in enumerate(names)
    ]
    budget = config.training.tokens_per_microbatch

    def of_rank(rank: int) -> list[Step]:
        return [pack_step(samples, tokens_per_microbatch=budget, rank=rank, num_ranks=num_ranks)] * num_steps

    source = f"samples of {tokens_per_sample} tokens, {loss_share:.0%} of them in the loss"
    return Workload(_by_step([of_rank(rank) for rank in range(num_ranks)]), source)


def _by_step(ranks: Sequence[Sequence[Step]]) -> tuple[tuple[tuple[Piece, ...], ...], ...]:
    """Ranks have as many microbatches in each step."""
    return tuple(
        tuple(
            tuple(
                Piece(m.sequence_lengths, m.num_loss_tokens, m.for_teacher().sequence_lengths, m.teacher_name)
                for m in microbatches
            )
            for microbatches in zip(*(step.microbatches for step in steps), strict=True)
        )
        for steps in zip(*ranks, strict=True)
    )
