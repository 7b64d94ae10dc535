"""What a run may ask of SGLang, and what is kdflow's to set: options, environment, versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from typing import Any

import torch

from kdflow.config import TeacherConfig
from kdflow.errors import ConfigError
from kdflow.modeling import resolve_device, resolve_model
from kdflow.teacher import sglang_plugin

TRIED = ("0.5.18", "0.5.21", "0.5.23")  # the first is the oldest that is accepted

# Options of the engine that teacher.engine_args may not set, and why.
OWN = {
    "model_path": "it is teacher.model",
    "device": "it is teacher.device",
    "dtype": "it is teacher.dtype",
    "tp_size": "it is teacher.tp_size",
    "dp_size": "teacher.num_workers are the replicas",
    "pp_size": "stages are not supported; use teacher.tp_size",
    "nnodes": "a teacher lives on one node",
    "enable_dp_attention": "hidden states are split over ranks there, which is not supported",
    "base_gpu_id": "the launcher counts GPUs",
    "enable_return_hidden_states": "it is always on",
    "disable_radix_cache": "it is always on, for rows of a cached prefix are not computed",
    "skip_tokenizer_init": "it is always on, for token ids go in",
    "custom_sigquit_handler": "the worker has its own",
    "enable_memory_saver": "transport.schedule: colocate turns it on",
    "enable_weights_cpu_backup": "transport.schedule: colocate turns it on",
    "speculative_algorithm": "a teacher does not decode",
}


def check_options(config: TeacherConfig, *, sleeps: bool) -> None:
    """
    Raises:
        ConfigError: SGLang, or what frees a GPU's memory, is missing; teacher.engine_args sets what is kdflow's to set.
    """
    for name in config.engine_args:
        if name in OWN:
            raise ConfigError(f"teacher.engine_args: leave {name} out; {OWN[name]}")
    _check_version()
    on_gpu = resolve_device(config.device).type == "cuda"
    if sleeps and on_gpu and importlib.util.find_spec("torch_memory_saver") is None:
        raise ConfigError(
            "transport.schedule: colocate needs torch_memory_saver, with which SGLang gives its memory back; "
            "pip install torch_memory_saver"
        )


def engine_options(
    config: TeacherConfig, device: torch.device, dtype: torch.dtype, *, sleeps: bool = False
) -> dict[str, Any]:
    """Keywords of sglang.Engine.

    Raises:
        ConfigError: there are not as many GPUs as it takes.
    """
    options: dict[str, Any] = {
        "model_path": resolve_model(config.model),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "tp_size": config.tp_size,
        "enable_return_hidden_states": True,
        "disable_radix_cache": True,
        "skip_tokenizer_init": True,
        # A teacher never decodes, which is what graphs are for.
        "disable_cuda_graph": True,
        # Else a scheduler without work takes a whole core.
        "sleep_on_idle": True,
        "log_level": "error",
    }
    if device.type == "cuda":
        last = (device.index or 0) + config.tp_size
        if last > torch.cuda.device_count():
            raise ConfigError(
                f"teacher.tp_size: {config.tp_size} GPUs from {device.index} on are needed, there are "
                f"{torch.cuda.device_count()}"
            )
        options["base_gpu_id"] = device.index
        if sleeps:
            # Without the backup an engine wakes with weights that are anything.
            options |= {"enable_memory_saver": True, "enable_weights_cpu_backup": True}
    else:
        options |= {"mem_fraction_static": 0.5, "max_total_tokens": 16384}
    return options | config.engine_args


def prepare_environment(device: torch.device, tp_size: int, *, sleeps: bool) -> None:
    """What SGLang reads when it is imported, here and in its processes."""
    os.environ[sglang_plugin.VARIABLE] = "1"
    # It wants room behind the prompt that a teacher never needs; see attach.
    os.environ.setdefault("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if sleeps and name in os.environ:
            # torch_memory_saver does not start beside this one, which is good for the student.
            kept = [o for o in os.environ[name].split(",") if not o.strip().startswith("expandable_segments")]
            os.environ[name] = ",".join(kept)
    if device.type == "cpu":
        os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
        if tp_size > 1:
            cores = sorted(os.sched_getaffinity(0))
            shares = [cores[rank::tp_size] or cores for rank in range(tp_size)]
            binding = "|".join(",".join(map(str, share)) for share in shares)
            os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", binding)


def _check_version() -> None:
    """
    Raises:
        ConfigError: SGLang is missing or too old.
    """
    found = installed_version()
    if found is None:
        raise ConfigError("teacher.backend: sglang is not installed; pip install 'kdflow[sglang]', or use backend hf")
    if _numbers(found) < _numbers(TRIED[0]):
        raise ConfigError(
            f"teacher.backend: expected sglang {TRIED[0]} or later (tried: {', '.join(TRIED)}), got {found}; update it"
        )


def installed_version() -> str | None:
    try:
        return importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
