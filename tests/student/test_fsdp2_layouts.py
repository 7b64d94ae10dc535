"""The same training however it is cut, sharded and recomputed: losses and final weights over 20 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode
from transformers import LlamaForCausalLM

from kdflow.config import LoraConfig
from support.ranks import run_on_ranks
from support.student import Rows, load_samples, make_student, rank_steps, whole
from support.tiny import make_config

NUM_STEPS, WHOLE, CUT = 20, 9999, 160
# Adapters begin at zero: at first some gradients are all rounding, which AdamW divides by. With 1e-8 the weights are
# 3e-5 apart after 20 steps, with 1e-7 6e-6, with 1e-6 7e-7.
LORA = {"lora": LoraConfig(rank=4, alpha=8.0), "eps": 1e-6}
Case = tuple[str, int, dict[str, Any]]  # model, tokens per microbatch, options


def train(folder: Path, model: str, budget: int, options: dict[str, Any]):
    """(loss of each step over all ranks, whole weights, most microbatches of a step)."""
    torch.manual_seed(0)
    # AdamW divides by gradients that may be all rounding; with 3e-3 the weights are 1.1e-5 apart after 20 steps.
    student = make_student(model, str(folder / "teacher"), num_steps=NUM_STEPS, learning_rate=1e-3, **options)
    rows = Rows(folder)
    losses, most = [], 0
    for step in rank_steps(
        load_samples(folder),
        num_steps=NUM_STEPS,
        samples_per_step=4,
        tokens_per_microbatch=budget,
        ranks_per_microbatch=options.get("context_parallel", 1),
    ):
        loss = torch.zeros(())
        most = max(most, len(step.microbatches))
        for microbatch in step.microbatches:
            last = microbatch is step.microbatches[-1]
            output = student.forward_backward(
                microbatch, lambda m=microbatch: rows(m), num_items=step.num_loss_tokens, last=last
            )
            loss += output.loss.detach().cpu()
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
        student.optimizer_step(step.index)
    names = (name.replace("_checkpoint_wrapped_module.", "") for name, _ in student.model.named_parameters())
    weights = (whole(p.detach()).clone() for p in student.model.parameters())
    return losses, dict(zip(names, weights, strict=True)), most


def train_all(folder: Path, cases: list[Case]):
    return [train(folder, *case) for case in cases]


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(5)
    LlamaForCausalLM(make_config(num_layers=2, tied=False)).save_pretrained(folder)
    return {"tied": str(tiny / "student"), "untied": str(folder)}


@pytest.fixture(scope="module")
def straight(tiny: Path, models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank, one microbatch, no options but LoRA."""
    cases = [(models["tied"], WHOLE, {}), (models["untied"], WHOLE, {}), (models["tied"], WHOLE, LORA)]
    (results,) = run_on_ranks(1, tmp_path_factory.mktemp("straight") / "ranks", train_all, tiny, cases)
    return dict(zip(("tied", "untied", "lora"), results, strict=True))


def check(result: Any, expected: Any, case: object) -> None:
    losses, weights, _ = result
    assert losses == pytest.approx(expected[0], rel=1e-5), case
    assert losses[-1] < losses[0]
    assert weights.keys() == expected[1].keys()
    for name, weight in expected[1].items():
        error = (weights[name] - weight).norm() / weight.norm()
        assert error < 1e-5, (case, name, error)


# By ranks: which straight run it must equal, and how it is done.
CASES: dict[int, list[tuple[str, int, dict[str, Any]]]] = {
    1: [
        ("tied", CUT, {}),
        ("untied", CUT, {"activation_checkpointing": "full"}),
        ("tied", CUT, {"activation_checkpointing": "selective"}),
        ("tied", CUT, {"cpu_offload": True}),
    ],
    2: [
        ("tied", WHOLE, {}),
        ("untied", 128, {"activation_checkpointing": "full"}),
        ("tied", 128, {"activation_checkpointing": "selective", "cpu_offload": True}),
        ("untied", WHOLE, {"vocab_parallel": True}),
        ("untied", 128, {"vocab_parallel": True, "activation_checkpointing": "full", "cpu_offload": True}),
        ("tied", CUT, {"context_parallel": 2}),
        ("untied", WHOLE, {"context_parallel": 2, "activation_checkpointing": "full", "vocab_parallel": True}),
        ("tied", WHOLE, {"context_parallel": 2, "activation_checkpointing": "selective"}),
        ("lora", WHOLE, LORA),
        ("lora", 128, LORA),
    ],
    4: [
        ("tied", WHOLE, {}),
        ("untied", WHOLE, {"activation_checkpointing": "full", "cpu_offload": True}),
        ("lora", WHOLE, LORA),
        ("tied", WHOLE, {"context_parallel": 2}),
        ("untied", WHOLE, {"replicate": 2, "vocab_parallel": True}),
    ],
}


@pytest.mark.parametrize("num_ranks", CASES)
def test_every_layout_is_the_straight_run(
    tiny: Path, tmp_path: Path, models: dict[str, str], straight: dict[str, Any], num_ranks: int
) -> None:
    cases = [(models.get(kind, models["tied"]), budget, options) for kind, budget, options in CASES[num_ranks]]
    ranks = run_on_ranks(num_ranks, tmp_path / "ranks", train_all, tiny, cases)
    for number, case in enumerate(CASES[num_ranks]):
        for results in ranks:
            check(results[number], straight[case[0]], case)
            if case[1] == CUT:
                assert results[number][2] > 1, "the step was not cut"


def count_reductions(folder: Path, model: str):
    """Reduce-scatters of a step's first and last microbatch."""
    student, rows = make_student(model, str(folder / "teacher")), Rows(folder)
    (step,) = rank_steps(
        load_samples(folder),
        num_steps=1,
        samples_per_step=8,
        tokens_per_microbatch=128,
    )
    counts = []
    for microbatch in step.microbatches:
        with CommDebugMode() as mode:
            student.forward_backward(
                microbatch,
                lambda m=microbatch: rows(m),
                num_items=step.num_loss_tokens,
                last=microbatch is step.microbatches[-1],
            )
        counts.append(sum(n for kind, n in mode.get_comm_counts().items() if "reduce_scatter" in str(kind)))
    return counts


def test_gradients_are_reduced_once_a_step(tiny: Path, tmp_path: Path) -> None:
    for counts in run_on_ranks(2, tmp_path / "ranks", count_reductions, tiny, str(tiny / "student")):
        assert len(counts) > 1
        assert set(counts[:-1]) == {0}
        assert counts[-1] == 3  # two layers and the root
