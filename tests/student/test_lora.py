"""Adapters: the base stays, the adapter is read by peft, and merging gives the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoModelForCausalLM

from kdflow.config import LoraConfig, StudentConfig
from kdflow.data import pack_step
from kdflow.errors import ConfigError
from kdflow.modeling import load_tokenizer
from kdflow.student import CheckpointFolder, CheckpointStore, export_checkpoint, export_model
from kdflow.student.lora import check_quantization, has_lora, merge_lora
from support.ranks import run_on_ranks
from support.student import CPU, Rows, load_samples, make_student

peft = pytest.importorskip("peft")


def train_and_save(folder: Path, output: Path, compute_dtype: str):
    """Two steps on an adapter; (whole weights by name, merged ones)."""
    lora = LoraConfig(rank=4, alpha=8.0, target_modules=["q_proj", "down_proj"])
    student = make_student(str(folder / "student"), str(folder / "teacher"), compute_dtype=compute_dtype, lora=lora)
    rows = Rows(folder)
    step = pack_step(load_samples(folder)[:4], tokens_per_microbatch=9999)
    (microbatch,) = step.microbatches
    for index in range(2):
        student.forward_backward(microbatch, lambda: rows(microbatch), num_items=step.num_loss_tokens, last=True)
        student.optimizer_step(index)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(student.model, options=options)
    assert has_lora(student.model)
    export_model(student, load_tokenizer(str(folder / "student")), output)
    checkpoints = CheckpointStore(output / "checkpoints", student)
    checkpoints.save(2)
    checkpoints.wait()
    checkpoints.close()
    newest = CheckpointFolder(output / "checkpoints").find(None)
    export_checkpoint(newest.path, StudentConfig(str(folder / "student"), lora=lora), output / "from-checkpoint")
    return weights, merge_lora(weights, lora.alpha / lora.rank)


def test_adapter_and_merged_model_are_one(tiny: Path, tmp_path: Path) -> None:
    ((weights, merged),) = run_on_ranks(1, tmp_path / "ranks", train_and_save, tiny, tmp_path / "out", "float32")
    start = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    before = start(input_ids=ids).logits
    for name, weight in start.state_dict().items():
        kept = weights.get(name, weights.get(name.replace(".weight", ".base_layer.weight")))
        assert torch.equal(kept, weight), f"the frozen {name} has moved"
    assert {n.split(".")[-4] for n in weights if "lora_A" in n} <= {"q_proj", "down_proj", "self_attn", "mlp"}
    by_peft = peft.PeftModel.from_pretrained(start, tmp_path / "out" / "adapter")(input_ids=ids).logits
    plain = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float32)
    plain.load_state_dict(merged)
    by_merge = plain(input_ids=ids).logits
    assert (by_merge - before).abs().max() > 1e-4, "the adapter learnt nothing"
    torch.testing.assert_close(by_merge, by_peft, rtol=1e-4, atol=1e-4)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weight in exported.items():
        assert torch.equal(weight, merged[name].bfloat16()), name
    later = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "from-checkpoint").state_dict()
    assert later.keys() == exported.keys()
    for name, weight in later.items():
        assert torch.equal(weight, exported[name]), name


def test_base_is_kept_in_the_compute_dtype(tiny: Path, tmp_path: Path) -> None:
    ((weights, _),) = run_on_ranks(1, tmp_path / "ranks", train_and_save, tiny, tmp_path / "out", "bfloat16")
    for name, weight in weights.items():
        assert weight.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16), name


def make_with(folder: Path, modules: list[str]):
    lora = LoraConfig(rank=2, target_modules=modules)
    with pytest.raises(ConfigError, match=r"student\.lora\.target_modules"):
        make_student(str(folder / "student"), str(folder / "teacher"), lora=lora)


@pytest.mark.parametrize("modules", [["no_such_layer"], ["lm_head"]])
def test_modules_that_cannot_be_had(tiny: Path, tmp_path: Path, modules: list[str]) -> None:
    run_on_ranks(1, tmp_path / "ranks", make_with, tiny, modules)


def test_quantized_base_needs_a_gpu() -> None:
    config = StudentConfig("m", lora=LoraConfig(rank=2, quantization="nf4"))
    with pytest.raises(ConfigError, match="nf4 needs a GPU"):
        check_quantization(config, CPU, 1)
