"""Runs that are killed at moments of chance and go on: forked from one process, which pays for the imports once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from support.processes import say

_stores: list[object] = []


def run_straight_and_killed(straight: str, killed: str, num_kills: int, seed: int) -> None:
    """Two runs, by their config files. Says, as JSON, how many kills met a checkpoint that was half written.

    Of several ranks a kill takes all, the first or the last; those that are left must end by themselves. No kill may
    cost a checkpoint that was there before it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch

    from kdflow.config_file import load_config
    from kdflow.student import CheckpointFolder

    torch.set_num_threads(1)
    _run_to_its_end(straight, resume=False)
    chance = random.Random(seed)
    folder = Path(load_config(killed).output_dir)
    checkpoints = CheckpointFolder(folder / "checkpoints")
    num_half_written, newest = 0, 0
    for number in range(num_kills):
        file, _ = _told(folder)
        ranks = _start(killed, resume=number > 0)
        _wait(ranks, lambda file=file: _told(folder)[0] != file)  # what was left half written is gone by now
        if number % 2:  # while a checkpoint is written, from its first file to some time after its last
            _wait(ranks, lambda: _half_written(folder))
        else:  # some steps on
            step = _told(folder)[1] + chance.randint(1, 4)
            _wait(ranks, lambda step=step: _told(folder)[1] >= step)
        time.sleep(chance.uniform(0.0, 0.015))
        for pid in chance.choice((ranks, ranks[:1], ranks[-1:])):
            os.kill(pid, signal.SIGKILL)
        assert all(code != 0 for code in _ended(ranks)), "it came to its end before it was killed"
        num_half_written += _half_written(folder)
        before, newest = newest, max((c.info.num_steps_done for c in checkpoints.all()), default=0)
        assert newest >= before
    _run_to_its_end(killed, resume=True)
    say(json.dumps(num_half_written))


def run_to_their_ends(*config_files: str) -> None:
    """Runs one after another, each in a process of its own."""
    import torch

    torch.set_num_threads(1)
    for config_file in config_files:
        _run_to_its_end(config_file, resume=False)


def _run_to_its_end(config_file: str, *, resume: bool) -> None:
    assert not any(_ended(_start(config_file, resume=resume), timeout_s=180.0))


def _start(config_file: str, *, resume: bool) -> list[int]:
    """A run of one rank as the launcher makes it, with its teachers; several ranks as processes of this one."""
    from torch.distributed import TCPStore

    from kdflow.config_file import load_config
    from kdflow.launcher.local import run
    from kdflow.launcher.prepare import open_output
    from kdflow.launcher.rank import Place, RankSpec, run_rank

    config = load_config(config_file, ["--resume=true"] if resume else [])
    num_ranks = config.student.num_ranks
    if num_ranks == 1:
        return [_forked(lambda: run(config, say=lambda text: None))]
    spec = RankSpec(config, str(open_output(config)), 1, None)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)  # the ranks of one start use it to their end

    def run_as(rank: int) -> None:
        run_rank(spec, place=Place(rank, num_ranks, store.port), stop_requested=lambda: False)

    return [_forked(lambda rank=rank: run_as(rank)) for rank in range(num_ranks)]


def _forked(function: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return pid


def _wait(ranks: list[int], condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert all(os.waitpid(pid, os.WNOHANG)[0] == 0 for pid in ranks), "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def _ended(ranks: list[int], timeout_s: float = 60.0) -> list[int]:
    """Exit codes, or minus the signal."""
    deadline, codes = time.monotonic() + timeout_s, {}
    while len(codes) < len(ranks):
        for pid in set(ranks) - set(codes):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        assert time.monotonic() < deadline, "one of them goes on without the others"
        time.sleep(0.005)
    return [codes[pid] for pid in ranks]


def _half_written(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("writing-*"))


def _told(folder: Path) -> tuple[int, int]:
    """Which file the metrics are in, and how many steps they tell of."""
    path = folder / "metrics.jsonl"
    return (path.stat().st_ino, path.read_text().count("\n")) if path.is_file() else (0, 0)
