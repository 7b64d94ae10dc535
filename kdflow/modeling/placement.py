"""Where a model runs and in which dtype."""

from __future__ import annotations

import numpy as np
import torch

from kdflow.config import Device, Dtype
from kdflow.errors import ConfigError


def resolve_device(device: Device, index: int = 0) -> torch.device:
    """`auto` is GPU `index` (counted round) where there is one, else the CPU.

    Raises:
        ConfigError: cuda was asked for and there is none.
    """
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device: expected a CUDA device, found none; use cpu or auto")
    return torch.device("cuda", index % torch.cuda.device_count())


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array as a tensor; from pinned memory on CUDA, so that the host does not wait for the device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on GPUs and on CPUs that multiply in it (AVX512-BF16, AMX), else float32.

    On other CPUs a bfloat16 matrix product is emulated and many times slower than float32.
    """
    if dtype != "auto":
        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[dtype]
    if device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return torch.bfloat16
    return torch.float32
