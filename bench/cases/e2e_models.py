"""Models of real shapes with random weights, for machines that reach no hub.

Times and memory do not depend on what the weights are, losses do: those mean nothing here but
that all providers compute the same. The tokenizer is trained on the text of the job and uses only
the first few thousand of the models' token ids.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from bench.cases.e2e_text import conversations

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
NUM_TOKENS = 4096


def model_folders(shapes: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Folder of each role's model, made where it is not there yet, in the system's temporary folder."""
    digest = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir(), f"kdflow-bench-{digest}")
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            aside = folder.with_suffix(".writing")
            shutil.rmtree(aside, ignore_errors=True)
            logging.disable_progress_bar()
            tokenizer = _train_tokenizer()
            for role, shape in shapes.items():
                _make_model(shape).save_pretrained(aside / role)
                tokenizer.save_pretrained(aside / role)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            aside.rename(folder)
    return {role: str(folder / role) for role in shapes}


def _make_model(shape: Mapping[str, Any]) -> Any:
    """In bfloat16; made on the GPU where there is one, since normal numbers take minutes on a CPU."""
    options = dict(shape)
    config = AutoConfig.for_model(
        options.pop("model_type"), **options, bos_token_id=0, eos_token_id=SPECIAL_TOKENS.index("<|im_end|>")
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def _train_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = (message["content"] for row in conversations() for message in row["messages"])
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )
