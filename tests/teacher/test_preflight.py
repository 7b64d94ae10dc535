"""Faults of a teacher, of its files and of what goes with them are told with their cause.

Those that engines commit are planted in a running one by test_sglang_engine.py.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdflow.config import TeacherConfig
from kdflow.errors import ConfigError, TeacherFault
from kdflow.teacher import TEACHERS, Teacher
from kdflow.teacher.preflight import Preflight
from support.sglang_engine import started


def config_of(model: Path) -> TeacherConfig:
    return TeacherConfig(model=str(model), backend="hf", dtype="float32", device="cpu")


def edited(model: Path, folder: Path, **values: object) -> Path:
    """A copy of the model whose config.json says otherwise."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    return folder


def reweighted(model: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of the model with other weights."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_sound_teachers_pass(models) -> None:
    for name in ("qwen3", "moe"):
        with started("hf", models(name)) as teacher:
            Preflight(config_of(models(name)), teacher).check_again()


def test_logit_scale_that_the_engine_ignores(models, tmp_path: Path) -> None:
    model = edited(models("llama"), tmp_path / "model", logit_scale=0.5)
    with (
        started("hf", model) as teacher,
        pytest.raises(TeacherFault, match=r"without its logit scale; the config says logit scale 0\.5"),
    ):
        Preflight(config_of(model), teacher)


class FaultyHF:
    """A Hugging Face teacher of one model, whose rows go through `change` on their way."""

    def __new__(cls, model: Path, change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Teacher:
        teacher = TEACHERS.get("hf")(config_of(model), gpu=0)
        sound = teacher.hidden_rows
        teacher.hidden_rows = lambda samples: change(sound(samples))  # type: ignore[method-assign]
        return teacher


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [rows[0], *(r.roll(-1, 0) for r in rows[1:])], "are shifted by"),
        (lambda rows: [r.fill_(float("nan")) for r in rows], "are not finite"),
        (lambda rows: [r[:-1] for r in rows], "expected hidden states"),
        (lambda rows: [r.zero_() for r in rows], "the teacher is uniform"),
        (lambda rows: [torch.randn_like(r) for r in rows], "of two checkpoints"),
        (lambda rows: [r.half().float() * 1.01 for r in rows], "disagree about"),
    ],
)
def test_other_kinds_are_held_to_the_same(models, change, message: str) -> None:
    model = models("qwen3")
    teacher = FaultyHF(model, change)
    with pytest.raises(TeacherFault, match=message):
        Preflight(config_of(model), teacher)
    teacher.close()


def test_head_of_another_checkpoint(models, tmp_path: Path) -> None:
    """The head is read from files that changed after the engine loaded them."""
    model = tmp_path / "model"
    shutil.copytree(models("qwen3"), model)
    with started("hf", model) as teacher:
        reweighted(models("qwen3"), model, lambda w: w["lm_head.weight"].mul_(-1))
        with pytest.raises(TeacherFault, match="of two checkpoints"):
            Preflight(config_of(model), teacher)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"vocab_size": 400}, r"expected an lm_head of 400 rows \(vocab_size of its config\), got 384"),
        ({"eos_token_id": 384}, "eos_token_id of its config is 384, outside its vocabulary of 384"),
        ({"hidden_size": 64}, "expected an lm_head of width 64, got 128"),
    ],
)
def test_config_that_does_not_fit(models, tmp_path: Path, values: dict[str, object], message: str) -> None:
    model = models("llama")
    with started("hf", model) as teacher, pytest.raises(ConfigError, match=message):
        Preflight(config_of(edited(model, tmp_path / "model", **values)), teacher)


def test_tokenizer_of_a_larger_model(models, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    shutil.copytree(models("llama"), model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<|new|>"])
    tokenizer.save_pretrained(model)
    with started("hf", models("llama")) as teacher, pytest.raises(ConfigError, match="ids up to 384, its lm_head 384"):
        Preflight(config_of(model), teacher)
