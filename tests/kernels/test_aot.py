"""Every form of the kernels compiles for every architecture, without a GPU; none spills, all load 16 bytes at once."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_triton_backend import DIVERGENCES

from kdflow_kernels import get_divergence
from kdflow_kernels.aot import ARCHITECTURES, CLUSTER_OPTIONS, DTYPES, OPTIONS, PARTS
from kdflow_kernels.cpp_divergences import cpp_twin
from kdflow_kernels.registers import next_allowance

pytest.importorskip("triton")
LINE = re.compile(
    r"sm_(\d+) (\w+) (\w+) +(row|parameters|choices|cluster) +"
    r"(.+?) +(\d+) registers +(\d+) B shared +(\d+) spills +(.*)"
)


OLDEST = Path(sys.prefix, "triton-3.6.0")  # the oldest release that pyproject.toml allows


# A process of its own: here Triton's functions are interpreted.
@pytest.mark.parametrize(
    "architecture, triton",
    [*((number, None) for number in ARCHITECTURES), (90, OLDEST)],
    ids=["80", "90", "100", "90 oldest"],
)
def test_every_form_compiles_and_spills_nothing(architecture: int, triton: Path | None):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton is not None:
        if not triton.is_dir():
            pytest.skip("needs triton 3.6.0, which `make test` puts beside its environment")
        environment["PYTHONPATH"] = str(triton)
    command = [sys.executable, "-m", "kdflow_kernels.aot", "--arch", str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = [LINE.fullmatch(line) for line in done.stdout.splitlines()]
    assert all(found), done.stdout
    assert {(m[2], m[3]) for m in found if m} == {(dtype, name) for dtype in DTYPES for name in DIVERGENCES}
    assert {m[5] for m in found if m} == {*OPTIONS, *PARTS}
    in_clusters = {(m[3], m[5]) for m in found if m and m[4] == "cluster"}
    covered = [name for name in DIVERGENCES if cpp_twin(get_divergence(name)) is not None]
    assert len(covered) == 7
    assert in_clusters == set(itertools.product(covered, CLUSTER_OPTIONS) if architecture >= 90 else ())
    for match in found:
        assert match is not None
        registers, spills, accesses = int(match[6]), int(match[8]), match[9]
        assert registers <= 255
        assert spills == 0
        # Paired reads the teacher's logits one by one, the student's at once.
        assert ("LDGSTS.128" if match[4] == "cluster" else "LDG.128") in accesses, match[0]
        without = ("no gradient", "parts, statistics", "parts, sums")
        forms_gradient = match[4] in ("row", "cluster") and match[5] not in without
        assert ("STG.128" in accesses) == forms_gradient, match[0]


def test_allowances_grow():
    assert [next_allowance(registers) for registers in (64, 80, 100, 128, 254, 255)] == [80, 128, 128, 255, 255, None]
