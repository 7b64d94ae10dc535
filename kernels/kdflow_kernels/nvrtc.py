"""CUDA C++ compiled at run time: by NVRTC, which every CUDA build of torch brings along, and launched by the driver."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Mapping
from pathlib import Path

# CUfunction_attribute, from cuda.h.
LOCAL_SIZE_BYTES = 3
NUM_REGS = 4
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
PREFERRED_SHARED_MEMORY_CARVEOUT = 9  # percent of the first-level cache that is to be shared memory
NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 14
CLUSTER_SCHEDULING_POLICY_PREFERENCE = 15
# CUclusterSchedulingPolicy: 0 leaves it to the driver, 1 spreads the blocks of a cluster over multiprocessors, 2 balances.
SCHEDULING_POLICY = 1


@functools.cache
def unavailable() -> str | None:
    """Why nothing can be compiled; None: it can."""
    try:
        _library()
    except OSError as error:
        return str(error)
    return None


def compile_cubin(source: Path, defines: Mapping[str, object], *, architecture: int) -> bytes:
    """Machine code of a file for one architecture (90: sm_90); #include finds what lies beside it. Needs no GPU.

    Raises:
        RuntimeError: the compiler's words.
        OSError: there is no NVRTC.
    """
    nvrtc = _library()
    program = ctypes.c_void_p()
    text, name = source.read_bytes(), source.name.encode()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None))
    try:
        options = [
            f"--gpu-architecture=sm_{architecture}",
            "--std=c++17",
            "--ftz=true",
            "--prec-div=false",
            f"--include-path={source.parent}",
            *(f"--define-macro={key}={value}" for key, value in defines.items()),
        ]
        encoded = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if nvrtc.nvrtcCompileProgram(program, len(options), encoded):
            log = _output(nvrtc, program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            raise RuntimeError(f"{source}: NVRTC does not compile it for sm_{architecture}:\n{log}")
        return _output(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig, from cuda.h, on the default stream and without attributes."""

    _fields_ = (
        *((f"grid_{axis}", ctypes.c_uint) for axis in "xyz"),
        *((f"block_{axis}", ctypes.c_uint) for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint),
    )


class Function:
    """A kernel in the current context, that of torch's current device; it takes one structure by value, and all the shared
    memory there is.

    driver: by default libcuda.
    """

    def __init__(
        self,
        cubin: bytes,
        name: str,
        *,
        shared_bytes: int,
        large_cluster: bool = False,
        driver: ctypes.CDLL | None = None,
    ) -> None:
        self._driver = driver or _libcuda()
        self._function, self._shared_bytes = ctypes.c_void_p(), shared_bytes
        module = ctypes.c_void_p()  # never unloaded: kernels may still run
        self._call("cuModuleLoadData", ctypes.byref(module), cubin)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), module, name.encode())
        self._call("cuFuncSetAttribute", self._function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes)
        self._call("cuFuncSetAttribute", self._function, PREFERRED_SHARED_MEMORY_CARVEOUT, 100)
        self._call("cuFuncSetAttribute", self._function, CLUSTER_SCHEDULING_POLICY_PREFERENCE, SCHEDULING_POLICY)
        if large_cluster:
            self._call("cuFuncSetAttribute", self._function, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)

    def launch(self, num_blocks: int, num_threads: int, parameters: ctypes.Structure, *, stream: int) -> None:
        """Enqueues the kernel; stream: the handle of one."""
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
        shape = (num_blocks, 1, 1, num_threads, 1, 1, self._shared_bytes)
        self._call("cuLaunchKernel", self._function, *shape, ctypes.c_void_p(stream), arguments, None)

    def figures(self, num_blocks: int, num_threads: int) -> dict[str, int]:
        """What the driver knows of it: registers of a thread, bytes of local memory, and how many clusters of the kernel
        run at once in a grid of so many blocks, a multiple of a cluster's."""
        found = {name: ctypes.c_int() for name in ("registers", "local_bytes", "clusters_at_once")}
        self._call("cuFuncGetAttribute", ctypes.byref(found["registers"]), NUM_REGS, self._function)
        self._call("cuFuncGetAttribute", ctypes.byref(found["local_bytes"]), LOCAL_SIZE_BYTES, self._function)
        config = LaunchConfig(num_blocks, 1, 1, num_threads, 1, 1, self._shared_bytes)
        clusters = ctypes.byref(found["clusters_at_once"])
        self._call("cuOccupancyMaxActiveClusters", clusters, self._function, ctypes.byref(config))
        return {name: value.value for name, value in found.items()}

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._driver, name)(*arguments)
        if error:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(error, ctypes.byref(text))
            numbers = [str(value) for value in arguments if isinstance(value, int)]
            raise RuntimeError(f"{name}({', '.join(numbers)}): {(text.value or b'unknown error').decode()} ({error})")


@functools.cache
def _library() -> ctypes.CDLL:
    """NVRTC: the one in the environment's packages, which is torch's, else whichever is found by its name."""
    import torch

    cuda = torch.version.cuda
    majors = [cuda.split(".")[0]] if cuda else ["13", "12"]
    for major in majors:
        name = f"libnvrtc.so.{major}"
        for library in _installed(name):
            # What some releases open by name alone, where nobody would look for it.
            for builtins in library.parent.glob(f"libnvrtc-builtins.so.{major}.*"):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(str(library))
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError(
        f"no NVRTC library (libnvrtc.so.{' or .'.join(majors)}); CUDA builds of torch bring it along, "
        "elsewhere pip install nvidia-cuda-nvrtc"
    )


def _installed(name: str) -> list[Path]:
    """A library of NVIDIA's packages in this environment."""
    folders = (Path(folder) / "nvidia" for folder in sys.path)
    return [found for folder in folders if folder.is_dir() for found in sorted(folder.glob(f"*/lib/{name}"))]


@functools.cache
def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(nvrtc: ctypes.CDLL, error: int) -> None:
    if error:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(error).decode()}")
