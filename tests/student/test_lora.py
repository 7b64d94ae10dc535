"""Adapters: the base stays, the adapter is read by peft, and merging gives the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from kdflow.config import LoraConfig, StudentConfig
from kdflow.data import pack_step
from kdflow.errors import ConfigError
from kdflow.modeling import load_tokenizer
from kdflow.student import CheckpointFolder, CheckpointStore, FSDP2Student, export_checkpoint, export_model
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


def train_quantized(folder: Path, output: Path, compute_dtype: str) -> dict[str, Any]:
    """Two steps on a 4-bit base, the same resumed, and both ways of exporting it: the losses of all."""
    lora = LoraConfig(rank=4, target_modules=["q_proj", "down_proj"], quantization="nf4")
    options = {"compute_dtype": compute_dtype, "lora": lora}
    student = make_student(str(folder / "student"), str(folder / "teacher"), **options)
    quantized = {name for name, weight in student.model.named_parameters() if weight.dtype == torch.uint8}
    adapters = {weight.dtype for weight in student.model.parameters() if weight.requires_grad}
    rows = Rows(folder)
    step = pack_step(load_samples(folder)[:4], tokens_per_microbatch=9999)
    (microbatch,) = step.microbatches

    def loss(of: FSDP2Student) -> torch.Tensor:
        return of.evaluate(microbatch, lambda: rows(microbatch), num_items=step.num_loss_tokens).loss

    found = {"quantized": quantized, "adapters": adapters, "start": loss(student)}
    for index in range(2):
        student.forward_backward(microbatch, lambda: rows(microbatch), num_items=step.num_loss_tokens, last=True)
        student.optimizer_step(index)
    found["trained"] = loss(student)
    checkpoints = CheckpointStore(output / "checkpoints", student)
    checkpoints.save(2)
    checkpoints.wait()
    checkpoints.close()
    again = make_student(str(folder / "student"), str(folder / "teacher"), **options)
    found["made anew"] = loss(again)
    resumed = CheckpointStore(output / "checkpoints", again)
    resumed.load()
    resumed.close()
    found["resumed"] = loss(again)
    export_model(student, load_tokenizer(str(folder / "student")), output / "model")
    newest = CheckpointFolder(output / "checkpoints").find(None)
    export_checkpoint(newest.path, StudentConfig(str(folder / "student"), lora=lora), output / "later")
    exported = make_student(str(output / "model"), str(folder / "teacher"), compute_dtype=compute_dtype)
    return found | {"exported": loss(exported)}


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_a_base_of_four_bits(tiny: Path, tmp_path: Path, compute_dtype: str) -> None:
    pytest.importorskip("bitsandbytes")
    (found,) = run_on_ranks(1, tmp_path / "ranks", train_quantized, tiny, tmp_path / "out", compute_dtype)
    num_layers = AutoConfig.from_pretrained(tiny / "student").num_hidden_layers
    assert len(found["quantized"]) == 7 * num_layers
    assert all(("q_proj" in name or "down_proj" in name) == (".base_layer." in name) for name in found["quantized"])
    assert found["adapters"] == {torch.float32}
    assert found["made anew"] == found["start"]
    assert found["trained"] < found["start"]
    assert found["resumed"] == found["trained"]
    # bfloat16 rounds what is exported.
    torch.testing.assert_close(found["exported"], found["trained"], rtol=2e-3, atol=0.0)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / "out" / name) for name in ("model", "later")]
    assert not hasattr(models[0].config, "quantization_config")
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.parametrize(
    ("rank", "num_ranks", "lacking"), [(2, 2, "a single rank"), (0, 1, r"student\.lora\.rank of at least 1")]
)
def test_a_base_of_four_bits_that_cannot_be_had(rank: int, num_ranks: int, lacking: str) -> None:
    config = StudentConfig("m", lora=LoraConfig(rank=rank, quantization="nf4"))
    with pytest.raises(ConfigError, match=f"nf4 needs {lacking}; use none"):
        check_quantization(config, CPU, num_ranks)
