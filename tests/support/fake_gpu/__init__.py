"""CUDA devices of torch over host memory, for processes that are started with `build`'s environment.

Values are those of the CPU's operators, so that what a test marked `gpu` compares is compared; devices are told apart,
collectives refuse the host's tensors, rings use the fake driver. Nothing is asynchronous, and nothing is fast.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

from support import fake_cuda

HERE = Path(__file__).parent


def build(folder: Path) -> dict[str, str]:
    """Compile it into `folder`, some 40 s, unless it is there; what a process needs in its environment to have it."""
    from torch.utils.cpp_extension import include_paths, library_paths

    library = folder / "fake_device.so"
    paths = [str(HERE), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"KDFLOW_CUDA_DRIVER": str(folder / "libfakecuda.so"), "PYTHONPATH": os.pathsep.join(paths)}
    if library.exists():
        return env
    folder.mkdir(parents=True)
    fake_cuda.build(folder)
    (libraries,) = library_paths()
    command = [
        *("c++", "-std=c++20", "-O1", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=fake_device"),
        *(f"-I{path}" for path in (*include_paths(), sysconfig.get_path("include"))),
        *(str(HERE / "device.cpp"), "-o", str(library)),
        *(f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_python", "-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    subprocess.run(command, check=True, timeout=280)
    return env
