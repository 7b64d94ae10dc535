from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdflow.data import pack_step, training_steps
from kdflow.errors import DataError
from kdflow.types import Sample


def make(lengths: list[int]) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [Sample(rng.integers(0, 99, n).astype(np.int32), np.arange(n) >= n // 2, i) for i, n in enumerate(lengths)]


@given(st.lists(st.integers(2, 50), min_size=4, max_size=30), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_cut_holds_the_same_samples(lengths: list[int], num_ranks: int) -> None:
    samples = make(lengths)
    steps = [pack_step(samples, tokens_per_microbatch=64, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert len({len(step.microbatches) for step in steps}) == 1
    microbatches = [m for step in steps for m in step.microbatches]
    assert all(0 < m.num_tokens <= 64 for m in microbatches)
    assert sorted(i for m in microbatches for i in m.sample_ids) == list(range(len(samples)))
    total = sum(s.num_loss_tokens for s in samples)
    assert all(step.num_loss_tokens == total for step in steps)
    assert sum(m.num_loss_tokens for m in microbatches) == total


def test_rank_without_samples_takes_part_without_loss() -> None:
    steps = [pack_step(make([60, 60, 60]), tokens_per_microbatch=64, rank=rank, num_ranks=2) for rank in range(2)]
    assert [[m.num_loss_tokens for m in step.microbatches] for step in steps] == [[30, 30], [30, 0]]
    assert steps[1].microbatches[1].num_tokens == 60


def test_fewer_samples_than_ranks() -> None:
    steps = [pack_step(make([10]), tokens_per_microbatch=64, rank=rank, num_ranks=3) for rank in range(3)]
    assert [[m.num_loss_tokens for m in step.microbatches] for step in steps] == [[5], [0], [0]]


def test_step_without_a_loss_token() -> None:
    samples = [Sample(np.zeros(4, np.int32), np.zeros(4, bool), 7)]
    with pytest.raises(DataError, match=r"step 3 has no token in the loss: look at the rows \[7\]"):
        pack_step(samples, tokens_per_microbatch=64, index=2)


@given(
    st.lists(st.tuples(st.integers(2, 50), st.sampled_from(["code", "maths", "prose"])), min_size=1, max_size=30),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_microbatch_is_of_one_teacher(drawn: list[tuple[int, str]], num_ranks: int) -> None:
    samples = [replace(s, teacher_name=name) for s, (_, name) in zip(make([n for n, _ in drawn]), drawn, strict=True)]
    steps = [pack_step(samples, tokens_per_microbatch=64, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    backwards = pack_step(samples[::-1], tokens_per_microbatch=64, num_ranks=num_ranks)
    assert len({len(step.microbatches) for step in (*steps, backwards)}) == 1
    microbatches = [m for step in steps for m in step.microbatches]
    assert all(0 < m.num_tokens <= 64 for m in microbatches)
    assert sorted(i for m in microbatches for i in m.sample_ids) == list(range(len(samples)))
    assert all(samples[i].teacher_name == m.teacher_name for m in microbatches for i in m.sample_ids)
    for name, count in steps[0].loss_tokens.items():
        assert count == sum(s.num_loss_tokens for s in samples if s.teacher_name == name)
        assert count == sum(m.num_loss_tokens for m in microbatches if m.teacher_name == name)
    assert sum(steps[0].loss_tokens.values()) == steps[0].num_loss_tokens
    fewest = sum(
        len(pack_step([s for s in samples if s.teacher_name == n], tokens_per_microbatch=64).microbatches)
        for n in steps[0].loss_tokens
    )
    assert len(steps[0].microbatches) - 1 <= -(-fewest // num_ranks), "no more than are needed"


def test_spare_microbatches_go_where_they_lighten_most() -> None:
    samples = [replace(s, teacher_name=n) for s, n in zip(make([10, 30, 30]), ("code", "maths", "maths"), strict=True)]
    ranks = [pack_step(samples, tokens_per_microbatch=64, rank=rank, num_ranks=3) for rank in range(3)]
    assert [[m.num_tokens for m in step.microbatches] for step in ranks] == [[30], [30], [10]]


def test_the_teachers_own_tokens_count_in_the_budget() -> None:
    long = [Sample(s.input_ids, s.loss_mask, s.sample_id, make([40])[0]) for s in make([20] * 6)]
    (step,) = training_steps(long, num_steps=1, samples_per_step=6, tokens_per_microbatch=64, seed=0)
    assert len(step.microbatches) == 6
    assert all(m.for_teacher().num_tokens == 40 for m in step.microbatches)
    assert step.num_tokens == 120


def test_ranks_are_level_in_each_microbatch() -> None:
    """Between ranks at the same time: the longest over the mean, summed up; lengths of real conversations."""
    lengths = np.random.default_rng(0).permutation([int(40 + 470 * (i / 99) ** 2) for i in range(100)]).tolist()
    longest = mean = 0.0
    for index in range(10):
        samples = make(lengths[10 * index : 10 * index + 10] * 4)
        ranks = [pack_step(samples, tokens_per_microbatch=1024, rank=r, num_ranks=4) for r in range(4)]
        for microbatches in zip(*(step.microbatches for step in ranks), strict=True):
            loads = [m.num_tokens for m in microbatches]
            longest += max(loads)
            mean += sum(loads) / 4
    assert longest / mean < 1.02


def steps_of(samples: list[Sample], **options) -> list[tuple[int, ...]]:
    defaults = {"num_steps": 5, "samples_per_step": 4, "tokens_per_microbatch": 999, "seed": 3}
    steps = training_steps(samples, **{**defaults, **options})
    return [tuple(sorted(i for m in s.microbatches for i in m.sample_ids)) for s in steps]


def test_epochs_visit_every_sample_once() -> None:
    samples = make([10] * 10)
    seen = [i for ids in steps_of(samples) for i in ids]
    assert sorted(seen[:8] + [i for i in seen[8:12] if i not in seen[:8]][:2]) == list(range(10))
    assert all(seen.count(i) == 2 for i in range(10))


def test_order_depends_on_the_seed_alone_and_can_start_anywhere() -> None:
    samples = make([10, 20, 30] * 5)
    whole = steps_of(samples)
    assert steps_of(samples, start=3) == whole[3:]
    assert steps_of(samples, tokens_per_microbatch=30) == whole
    assert steps_of(samples, seed=4) != whole
    ranks = [steps_of(samples, rank=rank, num_ranks=2) for rank in range(2)]
    assert [tuple(sorted(a + b)) for a, b in zip(*ranks, strict=True)] == whole
