"""Tiny real models: a byte-pair tokenizer and Llama models trained for seconds on real text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kdflow.modeling import prune_layers

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
VOCAB_SIZE = 384

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts_per_tok": 2}
FAMILIES = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16, num_experts=4, moe_intermediate_size=32)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SHAPE, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8)
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SHAPE, **EXPERTS, num_local_experts=4)),
}


def make_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_config(*, num_layers: int = 4, tied: bool = True, hidden_size: int = 48) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_conversations(num_rows: int = 40) -> list[dict[str, object]]:
    """Questions about the Python reference, each answered by two sentences of it."""
    rows: list[dict[str, object]] = []
    for name, text in sorted(topics.items()):
        body = " ".join(text.split("\n\n", 2)[1].split())[:160]
        if len(body) > 40:
            rows.append(
                {
                    "messages": [
                        {"role": "user", "content": f"What about {name}?"},
                        {"role": "assistant", "content": body[: 60 + 5 * (len(rows) % 20)]},
                    ]
                }
            )
    assert len(rows) >= num_rows
    return rows[:num_rows]


def make_models(folder: Path, *, num_steps: int = 60) -> None:
    """Writes `teacher` (4 layers, trained), `student` (2 of them) and `conversations.jsonl`."""
    torch.manual_seed(0)
    rows = make_conversations()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "conversations.jsonl").write_text(lines, encoding="utf-8")
    text = "\n".join(m["content"] for row in rows for m in row["messages"])  # type: ignore[attr-defined]
    tokenizer = make_tokenizer(text)
    model = LlamaForCausalLM(make_config())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        starts = torch.randint(0, len(ids) - 64, (8,), generator=generator)
        batch = torch.stack([ids[s : s + 64] for s in starts.tolist()])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, made in (("teacher", model), ("student", None)):
        made = made or prune_layers(model, 2)
        made.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def with_dropout(model: Path, folder: Path) -> Path:
    """A copy of the model with dropout in its attention."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return folder
