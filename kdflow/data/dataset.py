"""Tokenised samples of a run, and what happened to the rows that are not among them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdflow.config import DataConfig
from kdflow.data.chat import ChatTokenizer
from kdflow.data.sources import Row, load_rows
from kdflow.errors import DataError
from kdflow.types import Sample


@dataclass(frozen=True)
class DatasetReport:
    """How many rows were read, used, shortened and skipped, the latter by reason."""

    num_rows: int
    num_samples: int
    num_tokens: int
    num_loss_tokens: int
    num_truncated: int
    skipped: dict[str, int]

    def __str__(self) -> str:
        text = (
            f"{self.num_samples} samples of {self.num_rows} rows, {self.num_tokens} tokens, "
            f"{self.num_loss_tokens} in the loss"
        )
        if self.num_truncated:
            text += f"; {self.num_truncated} truncated"
        return text + "".join(f"; {n} skipped: {why}" for why, n in sorted(self.skipped.items()))


@dataclass(frozen=True)
class Dataset:
    samples: list[Sample]
    report: DatasetReport


def tokenize_rows(rows: list[Row], tokenizer: Any, config: DataConfig, source: str) -> Dataset:
    """Tokenises rows; those that cannot enter the loss are skipped and counted.

    Raises:
        DataError: no row is left.
    """
    chat = ChatTokenizer(tokenizer)
    samples: list[Sample] = []
    skipped: Counter[str] = Counter()
    num_truncated = 0
    for index, row in enumerate(rows):
        try:
            sample = chat.encode(_messages(row), index)
            if len(sample) > config.max_length:
                sample = _shorten(sample, config)
                num_truncated += 1
            if sample.num_loss_tokens == 0:
                raise DataError("no assistant token within max_length")
        except DataError as error:
            skipped[str(error)] += 1
            continue
        samples.append(sample)
    report = DatasetReport(
        num_rows=len(rows),
        num_samples=len(samples),
        num_tokens=sum(len(s) for s in samples),
        num_loss_tokens=sum(s.num_loss_tokens for s in samples),
        num_truncated=num_truncated,
        skipped=dict(skipped),
    )
    if not samples:
        raise DataError(f"data: {source}: no row can be used ({report})")
    return Dataset(samples, report)


def load_datasets(config: DataConfig, tokenizer: Any, seed: int) -> tuple[Dataset, Dataset | None]:
    """The training set and the held-out set (None where `num_eval_samples` is 0).

    Raises:
        DataError: a source is missing, empty or unusable.
    """
    train_rows = load_rows(config.train)
    if config.num_eval_samples == 0:
        return tokenize_rows(train_rows, tokenizer, config, config.train), None
    order = np.random.default_rng(seed).permutation
    if config.eval is not None:
        rows = load_rows(config.eval)
        chosen = sorted(order(len(rows))[: config.num_eval_samples].tolist())
        held_out = tokenize_rows([rows[i] for i in chosen], tokenizer, config, config.eval)
        return tokenize_rows(train_rows, tokenizer, config, config.train), held_out
    if len(train_rows) <= config.num_eval_samples:
        raise DataError(
            f"data: {config.train} has {len(train_rows)} rows, {config.num_eval_samples} of them to "
            "be held out: give data.eval or a smaller data.num_eval_samples"
        )
    chosen = set(order(len(train_rows))[: config.num_eval_samples].tolist())
    held_rows = [row for i, row in enumerate(train_rows) if i in chosen]
    kept_rows = [row for i, row in enumerate(train_rows) if i not in chosen]
    held_out = tokenize_rows(held_rows, tokenizer, config, f"{config.train} (held out)")
    return tokenize_rows(kept_rows, tokenizer, config, config.train), held_out


def _messages(row: Row) -> list[dict[str, str]]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise DataError("no `messages` list")
    for message in messages:
        if not (isinstance(message, dict) and {"role", "content"} <= message.keys()):
            raise DataError("a message without `role` and `content`")
    return messages


def _shorten(sample: Sample, config: DataConfig) -> Sample:
    if config.long_samples == "skip":
        raise DataError(f"longer than max_length {config.max_length}")
    excess = len(sample) - config.max_length
    # The prompt gives way from the left, down to the one token that predicts the answer's first.
    start = min(excess, max(int(np.argmax(sample.loss_mask)) - 1, 0))
    window = slice(start, start + config.max_length)
    return Sample(sample.input_ids[window], sample.loss_mask[window], sample.sample_id)
