"""How a sharded student gets its weights: as transformers reads them, and nowhere all of them in memory."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from kdflow.config import LoraConfig
from support.ranks import own_device, run_on_ranks
from support.student import make_student, whole
from support.tiny import FAMILIES, SHAPE

# Gemma's embeddings are scaled by a buffer, which would be rounded to the weights' dtype.
MODELS = {**FAMILIES, "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=16))}
# Of 32-bit numbers: far more than any one tensor, or than what Python needs besides.
LARGE = LlamaConfig(
    vocab_size=384, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, tie_word_embeddings=False
)


def loaded(models: list[str]) -> list[dict[str, torch.Tensor]]:
    """Of each model whole weights, and buffers."""
    students = [make_student(model, None).model for model in models]
    return [
        {**{name: whole(p.detach()) for name, p in model.named_parameters()}, **dict(model.named_buffers())}
        for model in students
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_rank_has_what_transformers_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    folders = [tmp_path / name for name in MODELS]
    for folder, make in zip(folders, MODELS.values(), strict=True):
        torch.manual_seed(3)
        make().to(dtype).save_pretrained(folder, max_shard_size="60KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    ranks = run_on_ranks(2, tmp_path / "ranks", loaded, [str(folder) for folder in folders])
    for number, folder in enumerate(folders):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        for found in ranks:
            assert found[number].keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[number][name].dtype == tensor.dtype, (folder, name)
                assert torch.equal(found[number][name], tensor), (folder, name)


def anonymous_bytes() -> int:
    """Of this process, what is no file's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def peak_bytes(small: str, large: str, lora_rank: int) -> int:
    """Most that loading the large model adds, once a small one has loaded all code."""
    lora = LoraConfig(rank=lora_rank)
    make_student(small, None, lora=lora)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    student = make_student(large, None, lora=lora)
    done.set()
    watcher.join()
    assert sum(p.numel() for p in student.model.parameters()) > 5e7
    return max(peak, anonymous_bytes()) - before


@pytest.mark.parametrize("dtype, lora_rank", [(torch.bfloat16, 0), (torch.float32, 0), (torch.bfloat16, 4)])
def test_no_rank_ever_holds_the_whole_model(tiny: Path, tmp_path: Path, dtype: torch.dtype, lora_rank: int) -> None:
    """Each of two has half of the float32 weights; with a whole copy beside them it would be three halves."""
    if own_device().type != "cpu":
        pytest.skip("it looks at host memory, where the weights are not")
    model = LlamaForCausalLM(LARGE).to(dtype)
    num_bytes = 4 * sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "large")
    del model
    folders = [str(tiny / "student"), str(tmp_path / "large")]
    for added in run_on_ranks(2, tmp_path / "ranks", peak_bytes, *folders, lora_rank):
        assert 0.5 * num_bytes < added < 0.8 * num_bytes
