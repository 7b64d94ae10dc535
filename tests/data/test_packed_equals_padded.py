"""Packed samples give the loss and the gradients of the same samples padded, with transformers' own attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kdflow.data import pack_step
from kdflow.modeling import forward_hidden_states, load_causal_lm
from kdflow.types import Sample
from kdflow_kernels import fused_kd_loss
from support.tiny import VOCAB_SIZE, make_config

LENGTHS = (5, 33, 17, 2, 60, 40, 21)


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(rng.integers(0, VOCAB_SIZE, n).astype(np.int32), np.arange(n) >= max(n // 3, 1), i)
        for i, n in enumerate(LENGTHS)
    ]


def make_model(kind: str, folder: Path) -> None:
    torch.manual_seed(1)
    if kind == "sliding window":
        options = make_config(tied=False).to_dict()
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        config = MistralConfig(
            vocab_size=VOCAB_SIZE, sliding_window=16, head_dim=12, **{name: options[name] for name in names}
        )
        MistralForCausalLM(config).save_pretrained(folder)
    else:
        LlamaForCausalLM(make_config(tied=kind == "tied")).save_pretrained(folder)


@pytest.mark.parametrize("kind", ["tied", "untied", "sliding window"])
def test_loss_and_gradients(kind: str, tmp_path: Path) -> None:
    make_model(kind, tmp_path)
    teacher = torch.Generator().manual_seed(2)
    teacher_head = torch.randn(VOCAB_SIZE, 24, generator=teacher) * 0.2
    teacher_rows = [torch.randn(s.num_loss_tokens, 24, generator=teacher) for s in samples()]
    step = pack_step(samples(), tokens_per_microbatch=80)
    assert len(step.microbatches) > 1

    def loss(model, hidden: torch.Tensor, labels: np.ndarray, sample_ids: tuple[int, ...]) -> torch.Tensor:
        return fused_kd_loss(
            hidden,
            model.get_output_embeddings().weight,
            torch.cat([teacher_rows[i] for i in sample_ids]),
            teacher_head,
            torch.from_numpy(labels),
            num_items=step.num_loss_tokens,
            ce_weight=0.5,
        ).loss

    packed = load_causal_lm(str(tmp_path), torch.float32)
    packed_loss = torch.zeros(())
    for microbatch in step.microbatches:
        hidden = forward_hidden_states(
            packed.base_model,
            torch.from_numpy(microbatch.input_ids).long(),
            torch.from_numpy(microbatch.position_ids()),
            microbatch.sequence_lengths,
        )[torch.from_numpy(microbatch.loss_rows).long()]
        part = loss(packed, hidden, microbatch.shift_labels(), microbatch.sample_ids)
        part.backward()
        packed_loss += part.detach()

    padded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids, mask = np.zeros((len(LENGTHS), max(LENGTHS)), np.int64), np.zeros((len(LENGTHS), max(LENGTHS)), np.int64)
    for row, sample in enumerate(samples()):
        ids[row, : len(sample)], mask[row, : len(sample)] = sample.input_ids, 1
    hidden = padded.base_model(
        input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), use_cache=False
    ).last_hidden_state
    rows = [hidden[row, np.flatnonzero(sample.loss_mask[1:])] for row, sample in enumerate(samples())]
    labels = np.concatenate([s.input_ids[s.loss_mask] for s in samples()]).astype(np.int64)
    padded_loss = loss(padded, torch.cat(rows), labels, tuple(range(len(LENGTHS))))
    padded_loss.backward()

    torch.testing.assert_close(packed_loss, padded_loss, rtol=1e-5, atol=0)
    expected = dict(padded.named_parameters())
    for name, parameter in packed.named_parameters():
        gradient = expected[name].grad
        assert gradient is not None
        assert gradient.abs().max() > 0
        torch.testing.assert_close(
            parameter.grad,
            gradient,
            rtol=1e-4,
            atol=1e-6 * float(gradient.abs().max()),
            msg=lambda text: f"{name}: {text}",  # noqa: B023
        )
