"""What a result depends on: hardware, instruction sets, clocks, versions, revision. No names of
machines or folders: results are published."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

PACKAGES = (
    "kdflow",
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger_kernel",
    "cut_cross_entropy",
    "ray",
    "pyzmq",
    "sglang",
    "numpy",
)
# The instruction sets that decide how fast bf16, fp16 and fp32 GEMMs are.
ISA_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "bf16", "sve")


def environment(*, device: str, num_threads: int) -> dict[str, Any]:
    """A JSON record of the machine and software as found now."""
    return {
        "kind": "environment",
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device,
        "cpu": _cpu(),
        "gpu": _gpu() if device.startswith("cuda") else None,
        "num_threads": num_threads,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": _versions(),
        "git": _git(),
    }


def has_native_bf16() -> bool:
    """Whether this CPU has bf16 matrix instructions; without them bf16 GEMMs are emulated."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & _flags())


def available_mib() -> float:
    """Memory that can be had without swapping."""
    match = re.search(r"^MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) / 1024


@functools.cache
def free_device_mib(device: str) -> float:
    """Memory of a CUDA device that nobody holds, asked in a process of its own: a context here
    would take some of it until the run ends."""
    ask = "import sys, torch; print(torch.cuda.mem_get_info(sys.argv[1])[0])"
    command = [sys.executable, "-c", ask, device]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no output"]
        raise ValueError(f"--device {device}: torch cannot use it here ({scrub(lines[-1])}); choose cpu or another one")
    return int(result.stdout) / 2**20


def scrub(message: str) -> str:
    """The message with every absolute path cut to its last part."""
    return re.sub(r"(?<![\w.:/])/(?:[\w.+@-]+/)+([\w.+@-]*)", r"\1", message)


def _cpuinfo(field: str) -> list[str]:
    pattern = rf"^{field}\s*:\s*(.*)$"
    return re.findall(pattern, Path("/proc/cpuinfo").read_text(), re.MULTILINE)


def _flags() -> set[str]:
    lines = _cpuinfo("flags") or _cpuinfo("Features")
    return set(lines[0].split()) if lines else set()


def _cpu() -> dict[str, Any]:
    models = _cpuinfo("model name")
    family = "/".join(value[0] for key in ("cpu family", "model") if (value := _cpuinfo(key)))
    mhz = [float(value) for value in _cpuinfo("cpu MHz")]
    flags = _flags()
    cache = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "model": models[0] if models else platform.machine(),
        "family_model": family,
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "mhz": round(max(mhz)) if mhz else None,
        "l3": cache.read_text().strip() if cache.exists() else None,
        "memory_gib": round(int(memory[1]) / 2**20, 1) if memory else None,
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _gpu() -> dict[str, Any] | None:
    fields = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(fields.split(","), output.stdout.splitlines()[0].split(", "), strict=True))


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    here = Path(__file__).parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return {"revision": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.SubprocessError):
        return None
