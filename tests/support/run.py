"""`kdflow train` as a command, and what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil

from kdflow.config import RunConfig
from kdflow.config_file import dump_config


def command(config: RunConfig, *options: str) -> list[str]:
    path = Path(config.output_dir).with_name("config-of-test.yaml")
    path.write_text(dump_config(config), encoding="utf-8")
    return [sys.executable, "-c", "from kdflow.cli import main; main()", "train", str(path), *options]


def train(
    config: RunConfig, *options: str, timeout_s: float = 240.0, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """In `folder`, or where the test is."""
    return subprocess.run(command(config, *options), capture_output=True, text=True, timeout=timeout_s, cwd=folder)


def metrics_of(config: RunConfig, kind: str) -> list[dict]:
    lines = Path(config.output_dir, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [m for m in map(json.loads, lines) if m["kind"] == kind]


def workers(launcher: int) -> list[psutil.Process]:
    """kdflow's teacher processes below a launcher."""
    return [p for p in psutil.Process(launcher).children() if "kdflow.teacher.worker" in p.cmdline()]
