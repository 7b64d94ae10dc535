"""Spans of a GPU's stream, tied to the host's clock."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from kdflow.config import ProfileConfig
from kdflow.tracing import open_trace
from kdflow.tracing.timeline import read_spans


@pytest.mark.gpu
def test_device_spans_last_as_long_as_the_work_and_lie_on_the_hosts_clock(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    a = torch.randn(4096, 4096, device=device)
    (a @ a).sum().item()
    before = time.monotonic_ns()
    with open_trace(ProfileConfig(timeline=True), tmp_path, "student", 0, device, host_is_ahead=True) as trace:
        for step in range(3):
            with trace.span("step", step=step):
                trace.phase("forward")
                for _ in range(20):
                    b = a @ a
                trace.phase("backward")
                b.sum().item()
            trace.end_of_step()
    after = time.monotonic_ns()
    of_gpu, of_host = sorted((tmp_path / "profile" / "spans").iterdir())
    host, gpu = read_spans(of_host), read_spans(of_gpu)
    assert [s.name for s in gpu] == [s.name for s in host] == ["forward", "backward", "step"] * 3
    slack = 1_000_000
    for on_host, on_gpu in zip(host, gpu, strict=True):
        assert before - slack < on_gpu.start_ns <= on_gpu.end_ns < after + slack
        assert on_gpu.end_ns > on_host.start_ns - slack
        if on_gpu.name == "forward":  # the host only queues it
            assert on_gpu.end_ns - on_gpu.start_ns > on_host.end_ns - on_host.start_ns
