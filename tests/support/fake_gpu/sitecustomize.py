"""Every Python that finds this folder on its path has fake CUDA devices; see device.cpp."""

import os
import sys

import torch_cuda  # noqa: F401

if "TRITON_INTERPRET" not in os.environ:
    sys.modules["triton"] = None  # type: ignore[assignment]  # it finds no driver; without it the loss is torch's
