"""compute-sanitizer finds nothing in the kernels: no access out of bounds, no race in shared memory.

Run as a script this file is what it looks at: the uses of one kernel, forward and backward.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_fused_kd_loss import make
from torch.utils.cpp_extension import CUDA_HOME

from kdflow_kernels import cluster_rows, fused_kd_loss, triton_backend

# Two blocks of columns, the second one nearly empty; every option that makes code of its own.
VOCAB = 4100
HEADS = {
    "student_bias": True, "teacher_bias": True, "student_softcap": 4.0, "teacher_softcap": 6.0,
    "student_logit_scale": 0.5, "teacher_logit_scale": 2.0,
}  # fmt: skip
USES: dict[str, list[dict]] = {
    "row_kernel": [
        {"divergence": "forward_kl"},
        {"divergence": "jsd", "ce_weight": 0.4, "temperature": 2.0},
        {"divergence": "jsd", "vocabulary": "padded", "ce_weight": 0.4},
        {"divergence": "forward_kl", "vocabulary": "paired"},
        {"divergence": "forward_kl", "grad_filter_eps": 1e-4},
        {"divergence": "reverse_kl", **HEADS},
    ],
    "tail_share_kernel": [
        {"divergence": "adaptive_kl", "vocabulary": vocabulary} for vocabulary in ("same", "padded", "paired")
    ],
    "choice_kernel": [
        {"divergence": divergence, "vocabulary": vocabulary}
        for divergence in ("top1_ce", "hierarchical_ranking")
        for vocabulary in ("same", "padded", "paired")
    ],
    "cluster_rows": [
        {"divergence": "forward_kl"},
        {"divergence": "jsd", "ce_weight": 0.4, "temperature": 2.0},
        {"divergence": "reverse_kl", "ce_weight": 0.4},
    ],
    "scale_kernel": [{"divergence": "forward_kl"}],
}


def sanitizer() -> str:
    toolkit = Path(CUDA_HOME or "/usr/local/cuda") / "bin" / "compute-sanitizer"
    found = shutil.which("compute-sanitizer") or shutil.which(toolkit)
    if found is None:
        pytest.skip(f"compute-sanitizer is neither in PATH nor {toolkit}")
    return found


def look_at(kernel: str, tool: str) -> subprocess.CompletedProcess:
    # Each tensor has memory of its own, so that what lies beyond it is nobody's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    options = ["--tool", tool, "--kernel-name", f"kns={kernel}", "--error-exitcode", "9"]
    command = [sanitizer(), *options, sys.executable, __file__, kernel]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
@pytest.mark.parametrize("kernel", USES)
def test_nothing_is_found(kernel: str, tool: str):
    if kernel == "cluster_rows" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no clusters")
    done = look_at(kernel, tool)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "SUMMARY: 0 " in done.stdout, done.stdout[-3000:]


@pytest.mark.gpu
def test_a_store_out_of_bounds_is_found():
    done = look_at("faulty_kernel", "memcheck")
    assert done.returncode == 9, done.stdout[-3000:] + done.stderr[-1000:]
    assert "faulty_kernel" in done.stdout


def use(kernel: str) -> None:
    if kernel == "cluster_rows":
        triton_backend.CLUSTER_ROWS = True
        cluster_rows.layout = lambda columns, *_: cluster_rows.cut(columns, 4, 2, 128)
    for options in USES[kernel]:
        for dtype in (torch.bfloat16, torch.float32):
            case = make(num_rows=5, vocab=VOCAB, **options).cast(dtype).to("cuda")
            loss = fused_kd_loss(**case.tensors, **case.options, backend="triton").loss
            (2.0 * loss).backward()  # another factor than 1 runs scale_kernel
            with torch.no_grad():
                fused_kd_loss(**case.tensors, **case.options, backend="triton")
    torch.cuda.synchronize()


def store_out_of_bounds() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def faulty_kernel(values):
        tl.store(values + 2**20 + tl.arange(0, 32), tl.zeros((32,), tl.float32))

    faulty_kernel[(1,)](torch.zeros(32, device="cuda"))  # pyright: ignore[reportIndexIssue]
    torch.cuda.synchronize()


if __name__ == "__main__":
    store_out_of_bounds() if sys.argv[1] == "faulty_kernel" else use(sys.argv[1])
