"""LoRA through peft: adapters beside a frozen base, exported alone or merged into it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from kdflow.config import StudentConfig
from kdflow.errors import ConfigError

_ADAPTER = "default"  # peft's name of the one there is
_IN_PEFT = "base_model.model."  # where peft's own wrapper has the model


def add_lora(model: Any, config: StudentConfig, base_dtype: torch.dtype) -> None:
    """Adapters of float32 on a causal LM, in place; the base is frozen and kept in `base_dtype`.

    Raises:
        ConfigError: no peft, or target modules that the model does not have.
    """
    if importlib.util.find_spec("peft") is None:
        raise ConfigError("student.lora: peft is not installed; pip install 'kdflow[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    lora = config.lora
    options = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules or "all-linear",
        base_model_name_or_path=config.model,
        task_type="CAUSAL_LM",
    )
    try:
        inject_adapter_in_model(options, model, adapter_name=_ADAPTER)
    except ValueError as error:
        raise ConfigError(f"student.lora.target_modules: {str(error).splitlines()[0]}") from None
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise ConfigError("student.lora.target_modules: the head cannot have an adapter; leave lm_head out")
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.float()  # on a 4-bit base peft makes them in the dtype that this computes in
        elif weight.is_floating_point():
            weight.data = weight.data.to(base_dtype)


def check_quantization(config: StudentConfig, device: torch.device, num_ranks: int) -> None:
    """Raises ConfigError where a 4-bit base is asked for and cannot be had."""
    if config.lora.quantization == "none":
        return
    lacking = [
        what
        for what, there in (
            ("student.lora.rank of at least 1", config.lora.rank > 0),
            ("a CPU or a GPU of Nvidia's", device.type in ("cpu", "cuda")),
            (
                "the package bitsandbytes (pip install 'kdflow[qlora]')",
                importlib.util.find_spec("bitsandbytes") is not None,
            ),
            ("a single rank", num_ranks == 1),
        )
        if not there
    ]
    if lacking:
        raise ConfigError(
            f"student.lora.quantization: {config.lora.quantization} needs {', '.join(lacking)}; use none, "
            "which keeps the frozen base in compute_dtype"
        )


def quantization_options(config: StudentConfig, device: torch.device, compute_dtype: torch.dtype) -> dict[str, Any]:
    """Keywords of `from_pretrained` for the base."""
    if config.lora.quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=config.lora.quantization, bnb_4bit_compute_dtype=compute_dtype
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def _quantized_layers(model: Any) -> Iterator[tuple[str, Any]]:
    if getattr(model.config, "quantization_config", None) is None:
        return
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportPrivateImportUsage]

    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def prepare_quantized(model: Any) -> None:
    """4-bit weights stay as they are: out of state dicts, since they are made anew from the model at each start, and in
    the layout that training reads.
    """

    def drop(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}weight")]:
            del state[name]

    def put_back(module: Any, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state[f"{prefix}weight"] = module.weight.data

    for _, layer in _quantized_layers(model):
        layer.support_avx512bf16_for_cpu = False  # else its first forward in eval mode lays the weight out anew
        layer.register_state_dict_post_hook(drop)
        layer.register_load_state_dict_pre_hook(put_back)


def dequantized_weights(model: Any) -> dict[str, torch.Tensor]:
    """The 4-bit weights of a model as they compute, whole and in float32, by the names of its state dict."""
    return {f"{name}.weight": _dequantized(layer.weight) for name, layer in _quantized_layers(model)}


def _dequantized(weight: Any) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state).float().cpu()


def has_lora(model: Any) -> bool:
    return _ADAPTER in getattr(model, "peft_config", {})


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """The base alone. peft's own switch also sets `requires_grad`, which is not to change once FSDP has the weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def without_weights(model: Any) -> Iterator[None]:
    """Float32 stand-ins without memory for all weights: adapters take their dtype, and the weights stay mapped."""
    kept = [(weight, weight.data) for weight in model.parameters()]
    for weight, data in kept:
        weight.data = torch.empty((), dtype=torch.float32).expand(data.shape)
    try:
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def lora_scaling(model: Any) -> float:
    """How often the adapters count."""
    config = model.peft_config[_ADAPTER]
    return config.lora_alpha / config.r


def save_adapter(model: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """The adapter alone, as `PeftModel.from_pretrained` reads it.

    Args:
        weights: whole ones, by the names of the model's state dict.
    """
    folder.mkdir(parents=True, exist_ok=True)
    adapter = {
        _IN_PEFT + name.replace(f".{_ADAPTER}.", "."): weight.contiguous()
        for name, weight in weights.items()
        if ".lora_" in name
    }
    save_file(adapter, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[_ADAPTER].save_pretrained(str(folder))


def merge_lora(weights: Mapping[str, torch.Tensor], scaling: float) -> dict[str, torch.Tensor]:
    """Weights of the plain model: W + scaling * B @ A in float32, named as without adapters.

    Args:
        weights: whole ones, by the names of the model's state dict.
        scaling: alpha / rank.
    """
    merged = {}
    for name, weight in weights.items():
        if ".lora_" in name:
            continue
        prefix = name.removesuffix("base_layer.weight")
        if prefix != name:
            a = weights[f"{prefix}lora_A.{_ADAPTER}.weight"].float()
            b = weights[f"{prefix}lora_B.{_ADAPTER}.weight"].float()
            weight = torch.addmm(weight.float(), b, a, alpha=scaling)
        merged[name.replace(".base_layer.", ".")] = weight
    return merged
