"""Loads models, tokenizers and single heads from folders or the hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging as transformers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from kdflow.errors import ConfigError
from kdflow.modeling.attention import PACKED_ATTENTION
from kdflow.modeling.decoder import head_options
from kdflow.types import LMHead

_HEAD_NAMES = ("lm_head", "output", "embed_out")
_FINAL_NORM_SUFFIXES = ("model.norm.weight", "final_layernorm.weight")
# Of a head that is packed integers, or scaled: what load_lm_head cannot read as a matrix.
_QUANTISED = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "scales", "weight.absmax")
_EMBEDDING_SUFFIXES = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


def hide_progress_bars() -> None:
    """Bars of transformers and the hub (loading weights, writing shards) would break up our own output."""
    transformers_logging.disable_progress_bar()


def resolve_model(model: str) -> str:
    """A folder or hub id as others take it: `~` is the home folder, as in a shell."""
    return str(Path(model).expanduser()) if model.startswith("~") else model


def load_model_config(model: str) -> Any:
    """The transformers config of a folder or hub id.

    Raises:
        ConfigError: neither exists.
    """
    try:
        return AutoConfig.from_pretrained(resolve_model(model))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: {model} is no folder with a config.json and no hub id that can be reached "
            f"({str(error).splitlines()[0]})"
        ) from None


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a folder or hub id.

    Raises:
        ConfigError: neither exists.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_model(model))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tokenizer of {model}: {str(error).splitlines()[0]}") from None


def load_causal_lm(model: str, dtype: torch.dtype, **options: Any) -> Any:
    """The model on the CPU, in eval mode, ready for packed samples.

    Args:
        options: further ones of `from_pretrained`.

    Raises:
        ConfigError: no such model, or weights that cannot be read.
    """
    return _load(AutoModelForCausalLM, model, dtype, **options)


def map_causal_lm(model: str, like: Any) -> Any:
    """The model with its weights in the dtype they are stored in, so that they stay in the mapped files until used.

    Where that cannot be (not all weights are of one dtype and safetensors, or buffers would take the lower precision
    along), it is in float32: in memory, unless it is stored so.

    Args:
        like: the same model in float32, without its weights.
    """
    dtype = _stored_dtype(model)
    mapped = load_causal_lm(model, dtype)
    buffers = {name: buffer.dtype for name, buffer in like.named_buffers()}
    if dtype != torch.float32 and any(buffer.dtype != buffers[name] for name, buffer in mapped.named_buffers()):
        return load_causal_lm(model, torch.float32)
    return mapped


def _stored_dtype(model: str) -> torch.dtype:
    """Of all tensors of a model; float32 where they differ, or cannot be looked at without being read."""
    try:
        files = _tensor_files(resolve_model(model))
        names = {"BF16": torch.bfloat16, "F16": torch.float16}
        found = set()
        for path in set(files.values()):
            with safe_open(path, framework="pt") as tensors:
                found |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    except (ConfigError, SafetensorError):
        return torch.float32
    return names.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def empty_causal_lm(model: str, dtype: torch.dtype) -> Any:
    """The model without its weights; to be called under `torch.device("meta")`.

    Raises:
        ConfigError: no such model.
    """
    config = load_model_config(model)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=PACKED_ATTENTION)


def load_decoder(model: str, dtype: torch.dtype) -> Any:
    """The model below its head, on the CPU, in eval mode, ready for packed samples.

    Raises:
        ConfigError: no such model, or weights that cannot be read.
    """
    return _load(AutoModel, model, dtype)


def _load(auto_class: Any, model: str, dtype: torch.dtype, **options: Any) -> Any:
    load_model_config(model)
    try:
        loaded, told = auto_class.from_pretrained(
            resolve_model(model),
            dtype=dtype,
            attn_implementation=PACKED_ATTENTION,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told of instead, by name
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise _unreadable(model, error) from None
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ConfigError(
            f"{model}: tensors that make up one weight (of experts, say) are missing or of different shapes; "
            "transformers names them above; fetch or save them again"
        ) from None
    _check_whole(model, told)
    return loaded.eval()


def _check_whole(model: str, told: Mapping[str, Any]) -> None:
    """Raises ConfigError where transformers filled weights at random: what it tells as missing is neither tied nor
    among those that a family does not store."""
    missing = sorted(told["missing_keys"])
    wrong = [f"{n} is {tuple(got)}, not {tuple(expected)}" for n, got, expected in sorted(told["mismatched_keys"])]
    if missing or wrong:
        raise ConfigError(
            f"{model}: expected all weights of its config, got files in which {len(missing)} of them are missing"
            f"{_first_two(missing)} and {len(wrong)} have another shape{_first_two(wrong)}; fetch or save them again"
        )


def _first_two(items: list[str]) -> str:
    return f" ({'; '.join(items[:2])}{'; ...' if len(items) > 2 else ''})" if items else ""


def _unreadable(model: str, error: Exception) -> ConfigError:
    return ConfigError(f"{model}: its weights cannot be read ({str(error).splitlines()[0]}); fetch or save them again")


def load_lm_head(model: str, dtype: torch.dtype) -> LMHead:
    """The head alone, read from the safetensors file that holds it; the model is not loaded.

    Tied heads are read from the embeddings.

    Raises:
        ConfigError: no safetensors, damaged ones, or no tensor that looks like a head.
    """
    try:
        return _read_lm_head(model, dtype)
    except SafetensorError as error:
        raise _unreadable(model, error) from None


def _read_lm_head(model: str, dtype: torch.dtype) -> LMHead:
    config = load_model_config(model)
    files = _tensor_files(resolve_model(model))
    quantised = [f"{n}.{part}" for n in _HEAD_NAMES for part in _QUANTISED if f"{n}.{part}" in files]
    if quantised:
        raise ConfigError(
            f"{model}: its lm_head is quantised ({quantised[0]}), and the student needs it as a matrix; use a "
            "checkpoint whose quantisation leaves lm_head out (most do), or the unquantised one"
        )
    prefix = next((n for n in _HEAD_NAMES if f"{n}.weight" in files), None)
    if prefix is not None:
        weight_name = f"{prefix}.weight"
    else:
        embeddings = [n for n in files if n.endswith(_EMBEDDING_SUFFIXES)]
        if len(embeddings) != 1 or not config.get_text_config().tie_word_embeddings:
            raise ConfigError(f"{model}: found no lm_head.weight among {len(files)} tensors")
        weight_name = embeddings[0]
    bias_name = f"{prefix}.bias"
    weight = _read(files[weight_name], weight_name)
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"{model}: its {weight_name} is quantised ({weight.dtype}), expected float32, bfloat16 or float16; use a "
            "checkpoint whose quantisation leaves lm_head out (most do), or the unquantised one"
        )
    logit_scale, softcap = head_options(config)
    return LMHead(
        weight=weight.to(dtype),
        bias=_read(files[bias_name], bias_name).to(dtype) if bias_name in files else None,
        logit_scale=logit_scale,
        softcap=softcap,
    )


def load_final_norm(model: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The RMS norm before the head as a function of float32 rows; None where the model has none that is known."""
    files = _tensor_files(resolve_model(model))
    names = [n for n in files if n.endswith(_FINAL_NORM_SUFFIXES) and "layers." not in n]
    if len(names) != 1:
        return None
    weight = _read(files[names[0]], names[0]).float()
    eps = load_model_config(model).get_text_config().to_dict().get("rms_norm_eps", 1e-6)
    return lambda rows: rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps) * weight


def _read(path: str, name: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as tensors:
        return tensors.get_tensor(name)


def _tensor_files(model: str) -> dict[str, str]:
    """Which file of the model holds which tensor.

    Raises:
        ConfigError: it has no safetensors, not all of them, or they are out of reach.
    """
    index = None
    with suppress(ConfigError):  # out of reach: a model of one file has no index, in the cache neither
        index = _file(model, "model.safetensors.index.json")
    if index is not None:
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        paths = {shard: _file(model, shard) for shard in set(names.values())}
        if missing := [shard for shard, path in paths.items() if path is None]:
            raise ConfigError(f"{model}: shards are missing: {', '.join(sorted(missing))}")
        return {name: str(paths[shard]) for name, shard in names.items()}
    single = _file(model, "model.safetensors")
    if single is None:
        raise ConfigError(f"{model}: expected safetensors files, found none; convert the checkpoint")
    with safe_open(single, framework="pt") as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _file(model: str, name: str) -> str | None:
    """Path of one file of a folder or hub id, None where the model has no such file.

    Raises:
        ConfigError: the hub is out of reach, and the file not in the cache.
    """
    if Path(model).is_dir():
        path = Path(model, name)
        return str(path) if path.is_file() else None
    try:
        return hf_hub_download(model, name)
    except LocalEntryNotFoundError as error:
        raise _unreadable(model, error) from None
    except EntryNotFoundError:
        return None
