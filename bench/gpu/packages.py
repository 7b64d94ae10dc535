"""``python -m bench.gpu.packages FILE``: which packages can be imported, in which version and time."""

from __future__ import annotations

import importlib
import json
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bench.environment import scrub

# By the name that they are imported under, and the one that they are installed under.
PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "kdflow_kernels": "kdflow",
    "transformers": "transformers",
    "cupy": "cupy-cuda13x",
    "jsonargparse": "jsonargparse",
    "zmq": "pyzmq",
    "datasets": "datasets",
    "liger_kernel": "liger-kernel",
    "trl.kernels.chunked_divergence": "trl",
    "cut_cross_entropy": "cut-cross-entropy",
}


def main() -> None:
    found = {}
    for name, distribution in PACKAGES.items():
        found[name] = _state(name, distribution)
        print(f"{name}: {found[name]}", flush=True)
        if name == "torch":
            found.update(_cuda())
        Path(sys.argv[1]).write_text(json.dumps(found))


def _cuda() -> dict[str, str]:
    import torch

    return {"cuda": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _state(name: str, distribution: str) -> str:
    start = time.perf_counter()
    try:
        importlib.import_module(name)
    # Whatever an import of somebody else's package raises is what there is to say about it.
    except Exception as error:
        return scrub(f"{type(error).__name__}: {error}".splitlines()[0])[:160]
    took = time.perf_counter() - start
    try:
        return f"{version(distribution)}, {took:.1f} s"
    except PackageNotFoundError:
        return f"from the checkout, {took:.1f} s"


if __name__ == "__main__":
    main()
