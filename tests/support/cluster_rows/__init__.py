"""The CUDA kernel of cluster_rows.cu on a host: compiled against host_device.hpp, in the place of the one for a GPU."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdflow_kernels import cluster_rows, nvrtc
from kdflow_kernels.cluster_rows import Form, Layout, Parameters

FOLDER = Path(__file__).parent
LIBRARIES = tempfile.TemporaryDirectory(prefix="kdflow-cluster-rows-")  # gone when the interpreter is


def use(monkeypatch: pytest.MonkeyPatch) -> list[Form]:
    """Problems that are covered go to the kernel on the host; returns the list of the forms they ask for."""
    forms: list[Form] = []

    def kernel(
        found: Layout, divergence: str, options: tuple[tuple[str, bool], ...], device: torch.device
    ) -> Callable[[int, Parameters], None]:
        assert device.type == "cpu"
        forms.append((found, divergence, options))
        return starter(found, build(found, divergence, options))

    monkeypatch.setattr(cluster_rows, "kernel", kernel)
    monkeypatch.setattr(cluster_rows, "unavailable", lambda device: None)
    return forms


def starter(found: Layout, library: ctypes.CDLL) -> Callable[[int, Parameters], None]:
    function = nvrtc.Function(b"", "cluster_rows", shared_bytes=found.shared_bytes, driver=library)
    return lambda num_blocks, parameters: function.launch(num_blocks, found.threads, parameters, stream=0)


@functools.cache
def build(
    found: Layout, divergence: str, options: tuple[tuple[str, bool], ...], source: Path = cluster_rows.SOURCE
) -> ctypes.CDLL:
    defines = cluster_rows.defines(found, divergence, options)
    library = Path(LIBRARIES.name) / f"{len(list(Path(LIBRARIES.name).iterdir()))}.so"
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    flags += ["-Wno-unknown-pragmas", f"-I{FOLDER}", f"-I{cluster_rows.SOURCE.parent}", f'-DKDFLOW_SOURCE="{source}"']
    flags += [f"-D{name}={value}" for name, value in defines.items()]
    subprocess.run(["g++", *flags, str(FOLDER / "host.cpp"), "-o", str(library)], check=True, timeout=120)
    return ctypes.CDLL(str(library))
