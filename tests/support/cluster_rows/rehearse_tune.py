"""bench.tune on fake devices (support/fake_gpu), with the kernel for clusters on the host; takes its options.

Triton is interpreted, numbers are real, times mean nothing.
"""

from __future__ import annotations

import functools
import os
import sys

import torch
import torch_cuda

from bench.tune import clusters, command, losses, measure, products, rows
from kdflow_kernels import cluster_rows, nvrtc, triton_backend
from support import cluster_rows as host


@functools.cache
def load(
    found: cluster_rows.Layout, divergence: str, options: tuple[tuple[str, bool], ...], device: torch.device
) -> nvrtc.Function:
    assert device.type == "cuda"
    library = host.build(found, divergence, options)
    return nvrtc.Function(b"", "cluster_rows", shared_bytes=found.shared_bytes, driver=library)


if __name__ == "__main__":
    torch_cuda.PROPERTIES.shared_memory_per_multiprocessor = cluster_rows.SHARED_BYTES
    cluster_rows.load = load
    cluster_rows.unavailable = lambda device: None
    triton_backend.CHUNK_ROWS = 4
    clusters.CUTS, clusters.ROWS_PER_CLUSTER, clusters.SCHEDULING_POLICIES = ((2, 2, 64),), (1,), (0,)
    clusters.REPETITIONS = 2
    rows.LAUNCHES = 1
    rows.median_ms = products.median_ms = functools.partial(measure.median_ms, repetitions=1)
    rows.KEPT_SHARES = losses.KEPT_SHARES = (0, 2)
    code = command.main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # autograd's threads of the fake devices may still run
