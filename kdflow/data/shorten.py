"""Samples that are longer than `data.max_length`, and the two sides of those that have their own context."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from kdflow.errors import DataError
from kdflow.types import Sample


def pair(student: Sample, teacher: Sample | None) -> Sample:
    """One sample of both sides.

    Raises:
        DataError: not the same tokens are in the loss on both.
    """
    if teacher is None:
        return student
    if not np.array_equal(student.input_ids[student.loss_mask], teacher.input_ids[teacher.loss_mask]):
        raise DataError("the teacher's messages do not end in the same tokens of the loss as the student's")
    return Sample(student.input_ids, student.loss_mask, student.sample_id, teacher)


def fit(sample: Sample, max_length: int, policy: Literal["truncate", "skip", "split"]) -> Iterator[Sample]:
    """The samples that come of one that may be too long; those without a token in the loss are left out.

    Raises:
        DataError: it is skipped.
    """
    if sample.longest <= max_length:
        pieces = [sample]
    elif policy == "skip":
        raise DataError(f"longer than max_length {max_length}")
    elif policy == "split":
        if sample.teacher is not None:
            raise DataError("longer than max_length, and what the teacher alone reads cannot be split")
        pieces = _split(sample, max_length)
    else:
        pieces = [_truncate(sample, max_length)]
    pieces = [piece for piece in pieces if piece.num_loss_tokens]
    if not pieces:
        raise DataError("no token of the loss within max_length")
    yield from pieces


def _split(sample: Sample, max_length: int) -> list[Sample]:
    """Windows that overlap by one token, so that each token but the first is predicted in just one of them."""
    return [_window(sample, start, start + max_length) for start in range(0, max(len(sample) - 1, 1), max_length - 1)]


def _truncate(sample: Sample, max_length: int) -> Sample:
    """Both sides shortened by themselves, with as many tokens in the loss as the one that keeps fewer of them."""
    sides = [_cut(side, max_length) for side in (sample, sample.for_teacher())]
    num_kept = min(side.num_loss_tokens for side in sides)
    student, teacher = (_first_loss_tokens(side, num_kept) for side in sides)
    return student if sample.teacher is None else pair(student, teacher)


def _cut(sample: Sample, max_length: int) -> Sample:
    # The prompt gives way from the left, down to the one token that predicts the answer's first.
    excess = max(len(sample) - max_length, 0)
    start = min(excess, max(int(np.argmax(sample.loss_mask)) - 1, 0))
    return _window(sample, start, start + max_length)


def _window(sample: Sample, start: int, stop: int) -> Sample:
    mask = sample.loss_mask[start:stop].copy()
    mask[:1] = False
    return Sample(sample.input_ids[start:stop], mask, sample.sample_id)


def _first_loss_tokens(sample: Sample, num_kept: int) -> Sample:
    mask = sample.loss_mask & (np.cumsum(sample.loss_mask) <= num_kept)
    return Sample(sample.input_ids, mask, sample.sample_id)
