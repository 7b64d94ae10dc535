from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kdflow.config import OptimizerConfig
from kdflow.data import pack_step, training_steps
from kdflow.student import export_model
from kdflow.student.optimizer import lr_factor
from support.ranks import run_on_ranks
from support.student import CONFIG, Rows, load_samples, make_student, whole
from support.tiny import make_config


def train(folder: Path, model: str, num_samples: int, budget: int, num_steps: int, options: dict[str, Any]):
    """Trains on this rank; (losses summed over ranks, full weights, first step's full gradients)."""
    student, rows = make_student(model, str(folder / "teacher"), **options), Rows(folder)
    losses, gradients = [], {}
    for step in training_steps(
        load_samples(folder),
        num_steps=num_steps,
        samples_per_step=num_samples,
        tokens_per_microbatch=budget,
        seed=0,
        rank=dist.get_rank(),
        num_ranks=dist.get_world_size(),
    ):
        loss = torch.zeros(())
        for microbatch in step.microbatches:
            last = microbatch is step.microbatches[-1]
            output = student.forward_backward(
                microbatch, lambda m=microbatch: rows(m), num_items=step.num_loss_tokens, last=last
            )
            loss += output.loss.detach().cpu()
        if step.index == 0:
            gradients = {n: whole(p.grad).clone() for n, p in student.model.named_parameters()}
        dist.all_reduce(loss)
        losses.append(loss.item() / dist.get_world_size())
        student.optimizer_step(step.index)
    weights = {n: whole(p.detach()).clone() for n, p in student.model.named_parameters()}
    return losses, weights, gradients


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "tied":
        return str(tiny / "student")
    folder = tmp_path_factory.mktemp("untied")
    torch.manual_seed(5)
    LlamaForCausalLM(make_config(num_layers=2, tied=False)).save_pretrained(folder)
    return str(folder)


def eager_reference(folder: Path, model: str, num_samples: int):
    """One step's loss and gradients by plain transformers: one sample at a time, full logits."""
    student = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    (step,) = training_steps(
        load_samples(folder), num_steps=1, samples_per_step=num_samples, tokens_per_microbatch=9999, seed=0
    )
    (microbatch,) = step.microbatches
    total, start = torch.zeros(()), 0
    for length in microbatch.sequence_lengths:
        ids = torch.from_numpy(microbatch.input_ids[start : start + length]).long()
        rows = [r - start for r in microbatch.loss_rows.tolist() if start <= r < start + length]
        z = student(input_ids=ids[None]).logits[0, rows]
        with torch.no_grad():
            p = (teacher(input_ids=ids[None]).logits[0, rows] / CONFIG["temperature"]).log_softmax(-1)
        q = (z / CONFIG["temperature"]).log_softmax(-1)
        kd = (p.exp() * (p - q)).sum()
        ce = torch.nn.functional.cross_entropy(z, ids[[r + 1 for r in rows]], reduction="sum")
        total = total + kd + CONFIG["ce_weight"] * ce
        start += length
    loss = total / step.num_loss_tokens
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters()}


def train_with_budgets(folder: Path, model: str, budgets: list[int]):
    return [train(folder, model, 4, budget, 1, {}) for budget in budgets]


@pytest.mark.parametrize("num_ranks, budgets", [(1, [9999, 150]), (2, [9999, 128])])
def test_gradients_do_not_depend_on_the_cut(
    tiny: Path, tmp_path: Path, model: str, num_ranks: int, budgets: list[int]
) -> None:
    """One rank or two, one microbatch or several: the eager gradient of the whole step."""
    loss, gradients = eager_reference(tiny, model, 4)
    for results in run_on_ranks(num_ranks, tmp_path / "ranks", train_with_budgets, tiny, model, budgets):
        for losses, _, ours in results:
            assert losses[0] == pytest.approx(loss, rel=1e-5)
            assert ours.keys() == gradients.keys()
            for name, gradient in gradients.items():
                error = (ours[name] - gradient).norm() / gradient.norm()
                assert error < 1e-4, (name, error)


def test_training_with_options_stays_the_same(tiny: Path, tmp_path: Path) -> None:
    """Checkpointed activations change memory only; bfloat16 follows float32 loosely."""
    model = str(tiny / "student")
    (plain,) = run_on_ranks(1, tmp_path / "plain", train, tiny, model, 4, 200, 6, {})
    (saved,) = run_on_ranks(1, tmp_path / "ac", train, tiny, model, 4, 200, 6, {"activation_checkpointing": "full"})
    (low,) = run_on_ranks(1, tmp_path / "bf16", train, tiny, model, 4, 200, 6, {"compute_dtype": "bfloat16"})
    np.testing.assert_allclose(saved[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(low[0], plain[0], rtol=0.05)
    assert plain[0][-1] < plain[0][0]


def export(folder: Path, model: str, output: Path):
    from kdflow.modeling import load_tokenizer

    student = make_student(model, str(folder / "teacher"))
    export_model(student, load_tokenizer(str(folder / "student")), output)
    step = pack_step(load_samples(folder)[:4], tokens_per_microbatch=9999)
    rows = Rows(folder)
    (microbatch,) = step.microbatches
    output = student.evaluate(microbatch, lambda: rows(microbatch), num_items=step.num_loss_tokens)
    return output.kd_loss.item(), output.ce_loss.item()


def test_export_round_trip(tiny: Path, tmp_path: Path, model: str) -> None:
    from transformers import AutoTokenizer

    run_on_ranks(2, tmp_path / "ranks", export, tiny, model, tmp_path / "hf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert read.dtype == torch.bfloat16
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    for name, weight in read.state_dict().items():
        assert torch.equal(weight, start[name].bfloat16()), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert read.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_evaluation_is_kl_and_cross_entropy(tiny: Path, tmp_path: Path) -> None:
    model = str(tiny / "teacher")
    ((kl, ce),) = run_on_ranks(1, tmp_path / "self", export, tiny, model, tmp_path / "hf")
    assert kl == pytest.approx(0.0, abs=1e-5)  # the teacher against itself
    assert 0.5 < ce < 6.0


def test_learning_rate() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, min_lr_ratio=0.1)
    factors = [lr_factor(step, config, 20) for step in range(21)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[12] == pytest.approx(0.55)
    assert factors[20] == pytest.approx(0.1)
    constant = OptimizerConfig(schedule="constant", warmup_steps=1)
    assert [lr_factor(s, constant, 9) for s in (0, 1, 8)] == [0.5, 1.0, 1.0]


def test_other_schedules() -> None:
    """Linear falls from the warm-up's end; wsd stays up and falls over the last steps; both end at the floor."""
    linear = OptimizerConfig(schedule="linear", warmup_steps=2, min_lr_ratio=0.2)
    assert [lr_factor(s, linear, 10) for s in (0, 1, 2, 6, 10)] == pytest.approx([1 / 3, 2 / 3, 1.0, 0.6, 0.2])
    wsd = OptimizerConfig(schedule="wsd", warmup_steps=2, min_lr_ratio=0.1, decay_ratio=0.4)
    assert [lr_factor(s, wsd, 10) for s in (1, 2, 6, 8, 10)] == pytest.approx([2 / 3, 1.0, 1.0, 0.55, 0.1])
