"""A microbatch cut along its tokens: every token is on one rank, the work is even, the result that of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, GptOssConfig, MistralConfig

from kdflow.modeling import PACKED_ATTENTION, ContextKeys, ContextSplit, forward_decoder, forward_hidden_states
from support.ranks import run_on_ranks

LENGTHS = (37, 3, 1, 24)


@pytest.mark.parametrize("lengths", [LENGTHS, (2,), (1,)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_token_and_loss_row_is_on_one_rank(lengths: tuple[int, ...], num_ranks: int) -> None:
    splits = [ContextSplit.of(lengths, rank, num_ranks) for rank in range(num_ranks)]
    own = [split.tokens for split in splits if not split.is_stand_in]
    assert sorted(np.concatenate(own)) == list(range(sum(lengths)))
    assert all(len(split.tokens) == sum(split.query_lengths) > 0 for split in splits)
    loss_rows = np.arange(0, sum(lengths), 2, dtype=np.int32)
    found = [split.loss_rows(loss_rows) for split in splits]
    assert sorted(np.concatenate([which for which, _ in found])) == list(range(len(loss_rows)))
    for split, (which, rows) in zip(splits, found, strict=True):
        assert np.array_equal(split.tokens[rows], loss_rows[which])


def test_attention_is_even() -> None:
    lengths, num_ranks = (4000, 1000, 3000), 4
    pairs = []
    for rank in range(num_ranks):
        split = ContextSplit.of(lengths, rank, num_ranks)
        pieces = zip(split.query_lengths, split.key_lengths, strict=True)
        pairs.append(sum(queries * (keys - (queries - 1) / 2) for queries, keys in pieces))
    assert max(pairs) / min(pairs) < 1.001
    assert sum(pairs) == sum(n * (n + 1) / 2 for n in lengths)


def make_model(sliding_window: int | None, sinks: bool) -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": sliding_window,
    }
    config, options = MistralConfig(**shape), {}
    if sinks:  # experts by plain products, as grouped ones have no float64
        config = GptOssConfig(**shape, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
        options = {"experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, attn_implementation=PACKED_ATTENTION, **options).double()


def furthest(lengths: tuple[int, ...], sliding_window: int | None, sinks: bool = False) -> float:
    """How far hidden states and summed gradients of this rank's part are from those of the whole."""
    rank, num_ranks, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    ids = torch.randint(3, 300, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(n) for n in lengths])
    weight = torch.linspace(-1, 1, sum(lengths) * 32, dtype=torch.float64).view(-1, 32)

    whole = make_model(sliding_window, sinks)
    expected = forward_hidden_states(whole.base_model, ids, positions, lengths)
    (expected * weight).sum().backward()

    split = ContextSplit.of(lengths, rank, num_ranks)
    own = torch.from_numpy(split.tokens)
    parted = make_model(sliding_window, sinks)
    context = ContextKeys(split, group, torch.device("cpu"))
    hidden = forward_decoder(parted.base_model, ids[own], positions[own], lengths, context).last_hidden_state[0]
    (hidden * weight[own] * (0.0 if split.is_stand_in else 1.0)).sum().backward()
    errors = [(hidden - expected[own]).abs().max()]
    for found, true in zip(parted.base_model.parameters(), whole.base_model.parameters(), strict=True):
        assert found.grad is not None
        assert true.grad is not None
        dist.all_reduce(found.grad)
        errors.append((found.grad - true.grad).norm() / true.grad.norm())
    return float(max(errors))


def all_cases() -> list[float]:
    return [furthest(*case) for case in [(LENGTHS, None), (LENGTHS, 6), (LENGTHS, 6, True), ((2,), None)]]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_make_the_whole(tmp_path: Path, num_ranks: int) -> None:
    for errors in run_on_ranks(num_ranks, tmp_path / "ranks", all_cases):
        assert max(errors) < 1e-12, errors
