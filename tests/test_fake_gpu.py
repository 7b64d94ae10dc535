"""Tests marked `gpu` on devices that are not there (support/fake_gpu): what a GPU's code does, not how fast or when."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from support import fake_gpu

pytestmark = [
    pytest.mark.skipif(
        torch.version.cuda is not None or not torch.__version__.startswith("2.13."),
        reason="stands in for parts of a CPU build of torch 2.13",
    ),
    pytest.mark.timeout(900),
]
LAUNCHER, STUDENT = "tests/launcher/test_train_cuda.py", "tests/student/test_fsdp2_cuda.py"


@pytest.fixture(scope="session")
def fake_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of processes that have them; built once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with FileLock(str(folder / "fake-gpu.lock")):
        return fake_gpu.build(folder / "fake-gpu")


@pytest.mark.parametrize(
    ("file", "selection", "triton", "at_least"),
    [
        (LAUNCHER, "two_gpus", False, 4),
        (LAUNCHER, "devices_and_rings", False, 5),
        (LAUNCHER, "not two_gpus and not devices_and_rings", False, 4),
        ("tests/modeling/test_attention_cuda.py", "", False, 7),
        (STUDENT, "", False, 3),
        (STUDENT, "", True, 3),
        # Those of the student that are for every device.
        ("tests/student/test_fsdp2_layouts.py", "", False, 4),
        ("tests/student/test_checkpoint.py", "", False, 10),
        ("tests/student/test_lora.py", "not four_bits", False, 4),  # bitsandbytes has no such devices
        ("tests/student/test_router.py", "", False, 4),
        ("tests/transport/test_cuda_gpu.py", "staging", False, 1),
    ],
)
def test_gpu_tests_pass(
    fake_devices: dict[str, str], tmp_path: Path, file: str, selection: str, triton: bool, at_least: int
) -> None:
    """With the loss of the torch backend, or with the Triton kernels, interpreted."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env |= fake_devices | ({"TRITON_INTERPRET": "1"} if triton else {}) | {"KDFLOW_TEST_DEVICE": "cuda"}
    marked = "gpu" if file.endswith(("_cuda.py", "_gpu.py")) else "not soak"
    command = [sys.executable, "-m", "pytest", "-n0", "-m", marked, "-k", selection, f"--basetemp={tmp_path}/run", file]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=840)
    assert result.returncode == 0, result.stdout[-20_000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least
    assert "skipped" not in result.stdout
