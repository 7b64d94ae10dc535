"""Runs that are killed at moments of chance and go on: forked from one process, which pays for the imports once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

from support.processes import say


def run_killed(config_file: str, num_kills: int, seed: int) -> None:
    """Says, as JSON, how many kills met a checkpoint that was half written. The last process runs to the end."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from kdflow.config import load_config

    torch.set_num_threads(1)
    chance = random.Random(seed)
    folder = Path(load_config(config_file).output_dir)
    num_half_written = 0
    for number in range(num_kills):
        file, _ = _told(folder)
        pid = _start(config_file, resume=number > 0)
        _wait(pid, lambda file=file: _told(folder)[0] != file)  # what was left half written is gone by now
        if number % 2:  # while a checkpoint is written, from its first file to some time after its last
            _wait(pid, lambda: _half_written(folder))
        else:  # some steps on
            step = _told(folder)[1] + chance.randint(1, 4)
            _wait(pid, lambda step=step: _told(folder)[1] >= step)
        time.sleep(chance.uniform(0.0, 0.015))
        os.kill(pid, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "it came to its end before it was killed"
        num_half_written += _half_written(folder)
    _, status = os.waitpid(_start(config_file, resume=num_kills > 0), 0)
    assert status == 0
    say(json.dumps(num_half_written))


def _start(config_file: str, *, resume: bool) -> int:
    from kdflow.config import load_config
    from kdflow.launcher.local import run

    pid = os.fork()
    if pid == 0:
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            run(load_config(config_file, ["--resume=true"] if resume else []), say=lambda text: None)
            code = 0
        finally:
            os._exit(code)
    return pid


def _wait(pid: int, condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert os.waitpid(pid, os.WNOHANG)[0] == 0, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def _half_written(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("writing-*"))


def _told(folder: Path) -> tuple[int, int]:
    """Which file the metrics are in, and how many steps they tell of."""
    path = folder / "metrics.jsonl"
    return (path.stat().st_ino, path.read_text().count("\n")) if path.is_file() else (0, 0)
