"""Uses the installed wheel as its users would: `python use_wheel.py FOLDER`, outside the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch

import kdflow
import kdflow_kernels
from kdflow.transport import HiddenRing
from kdflow_kernels import cluster_rows


def main() -> None:
    folder = Path(sys.argv[1])
    for module in (kdflow, kdflow_kernels):
        home = Path(module.__file__).parent
        assert home.is_relative_to(folder), f"{module.__name__} is from {home}, not the wheel"
        assert (home / "py.typed").is_file()
    assert not list(folder.glob("bench")), "the wheel carries the benches"

    # Compiled on the user's GPU, from what the wheel brings along.
    source = cluster_rows.SOURCE
    assert source.is_relative_to(folder)
    beside = re.findall(r'#include "(d\w+.hpp)"', source.read_text())
    assert beside == ["device.hpp", "divergences.hpp"]
    assert all(source.with_name(name).is_file() for name in (source.name, *beside))

    torch.manual_seed(0)
    student, teacher = torch.nn.Linear(16, 50, bias=False), torch.nn.Linear(24, 50, bias=False)
    hidden = torch.randn(7, 16, requires_grad=True)
    output = kdflow_kernels.fused_kd_loss(hidden, student.weight, torch.randn(7, 24), teacher.weight)
    output.loss.backward()
    assert hidden.grad is not None
    assert student.weight.grad is not None

    with HiddenRing.create(name="wheel", num_slots=2, slot_bytes=4096) as ring:
        producer, consumer = (HiddenRing.attach(ring.handle, role=r) for r in ("producer", "consumer"))
        with producer.reserve(ticket=0) as slot:
            slot.tensor((3, 4), torch.bfloat16).fill_(2.5)
        with consumer.receive(ticket=0) as slot:
            assert slot.tensor().sum().item() == 30.0

    run = [sys.executable, "-c", "from kdflow.cli import main; main()", "train", "--help"]
    text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "--student.model" in text
    print(f"wheel of kdflow {kdflow.__version__} works")


if __name__ == "__main__":
    main()
