"""The load-balancing loss of students with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from kdflow.config import StudentConfig
from kdflow.data import pack_step
from kdflow.errors import ConfigError
from kdflow.student.router import router_weight
from kdflow.types import Microbatch
from support.ranks import run_on_ranks
from support.student import Rows, load_samples, make_student, whole
from support.tiny import FAMILIES

COEF = 0.5


def gradient_of(folder: Path, model: str, budget: int, options: dict[str, Any]):
    student, rows = make_student(model, str(folder / "teacher"), **options), Rows(folder)
    step = pack_step(
        load_samples(folder)[:4], tokens_per_microbatch=budget, rank=dist.get_rank(), num_ranks=dist.get_world_size()
    )
    loss = torch.zeros(())
    for microbatch in step.microbatches:
        output = student.forward_backward(
            microbatch,
            lambda m=microbatch: rows(m),
            num_items=step.num_loss_tokens,
            last=microbatch is step.microbatches[-1],
        )
        loss += output.loss.detach().cpu()
    dist.all_reduce(loss)
    found = {
        n.replace("_checkpoint_wrapped_module.", ""): whole(p.grad).clone() for n, p in student.model.named_parameters()
    }
    return loss.item() / dist.get_world_size(), found, step.microbatches


def with_and_without(folder: Path, model: str, budget: int, options: dict[str, Any]):
    return [gradient_of(folder, model, budget, {**options, "router_aux_loss_coef": coef}) for coef in (COEF, 0.0)]


def by_transformers(model: str, microbatches: list[Microbatch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Transformers' own function for each microbatch, of routers that saw one sample at a time."""
    eager = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    num_chosen, total = eager.config.num_experts_per_tok, sum(m.num_loss_tokens for m in microbatches)
    loss = torch.zeros(())
    for m in microbatches:
        samples = torch.from_numpy(m.input_ids).long().split(m.sequence_lengths)
        layers = zip(
            *(eager(input_ids=ids[None], output_router_logits=True).router_logits for ids in samples), strict=True
        )
        own = load_balancing_loss_func(tuple(torch.cat(layer) for layer in layers), eager.num_experts, num_chosen)
        loss = loss + COEF * m.num_loss_tokens / total * own
    loss.backward()
    return loss.item(), {n: p.grad for n, p in eager.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name, num_ranks, options",
    [
        ("qwen3_moe", 1, {}),
        ("qwen3_moe", 2, {}),
        ("mixtral", 1, {"activation_checkpointing": "full"}),
    ],
)
def test_it_is_transformers_own(tiny: Path, tmp_path: Path, name: str, num_ranks: int, options: dict[str, Any]) -> None:
    """Loss and gradient, less those without it; over microbatches and ranks by their parts of the loss tokens."""
    torch.manual_seed(3)
    model = str(tmp_path / "model")
    FAMILIES[name]().save_pretrained(model)
    ranks = run_on_ranks(num_ranks, tmp_path / "ranks", with_and_without, tiny, model, 128, options)
    microbatches = [m for with_it, _ in ranks for m in with_it[2]]
    loss, gradient = by_transformers(model, microbatches)
    assert {n for n, g in gradient.items() if "gate.weight" in n and g.norm() > 0}, "the routers get nothing"
    for (ours, with_it, _), (plain, without, _) in ranks:
        assert ours - plain == pytest.approx(loss, rel=1e-4)
        for n, expected in gradient.items():
            assert (with_it[n] - without[n] - expected).norm() < 1e-4 * max(expected.norm(), with_it[n].norm()), n


def test_who_has_one() -> None:
    moe, dense = FAMILIES["qwen3_moe"]().config, FAMILIES["qwen3"]().config
    assert router_weight(StudentConfig("m"), dense) == 0.0
    assert router_weight(StudentConfig("m", router_aux_loss_coef=0.25), moe) == 0.25
    assert router_weight(StudentConfig("m", router_aux_loss_coef="model"), moe) == moe.router_aux_loss_coef > 0
    with pytest.raises(ConfigError, match=r"m \(qwen3\) has no load-balancing loss"):
        router_weight(StudentConfig("m", router_aux_loss_coef="model"), dense)
