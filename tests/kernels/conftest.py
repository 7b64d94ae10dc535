"""Triton kernels run on the GPU where there is one, else in Triton's interpreter, chosen when they are loaded."""

import contextlib
import os

import pytest
import torch

with pytest.MonkeyPatch.context() as patch:
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    with contextlib.suppress(ImportError):
        import kdflow_kernels.jit_divergences
        import kdflow_kernels.row_kernels  # noqa: F401


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch):
    """Of these tests alone: what others start shall not inherit it."""
    if not torch.cuda.is_available():
        monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
