"""Teacher processes as the launcher sees them: while they load, and when one cannot be started again."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from kdflow.config import ProfileConfig, TeacherConfig
from kdflow.errors import TeacherDied, TeacherTimeout
from kdflow.launcher.teachers import TeacherProcess, wait_ready
from kdflow.teacher.worker import WorkerSpec
from kdflow.transport import HiddenRing, RequestRing, request_bytes


def make_teacher(teacher: TeacherConfig, log: Path, requests: str = "", hidden: str = "") -> TeacherProcess:
    spec = WorkerSpec(
        teacher=teacher,
        profile=ProfileConfig(),
        folder=str(log.parent),
        index=0,
        gpu=0,
        num_threads=1,
        requests=requests,
        hidden=[hidden],
        placement="host",
        turns=None,
        timeout_s=30.0,
        longest_sample=64,
        ready_fd=-1,
    )
    return TeacherProcess(spec, log, lambda text: None)


def test_all_are_watched_while_one_loads(tmp_path: Path) -> None:
    config = TeacherConfig("m", max_restarts=0)
    with make_teacher(config, tmp_path / "a.log") as slow, make_teacher(config, tmp_path / "b.log") as dead:
        os.kill(slow.pid, signal.SIGSTOP)
        try:
            with pytest.raises(TeacherTimeout, match=rf"teacher process {slow.pid} did not load within 0 s; .*a\.log"):
                wait_ready([slow], 0.0)
            os.kill(dead.pid, signal.SIGKILL)
            with pytest.raises(TeacherDied, match=rf"teacher process {dead.pid} ended with signal 9"):
                wait_ready([slow, dead], 60.0)
        finally:
            os.kill(slow.pid, signal.SIGCONT)


def test_a_teacher_that_cannot_be_started_again_gives_its_seats_up(tiny: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    config = TeacherConfig(str(tiny / "teacher"), device="cpu")
    with (
        RequestRing.create(name="requests", num_slots=4, slot_bytes=request_bytes(64)) as requests,
        HiddenRing.create(name="hidden", num_slots=4, slot_bytes=1 << 16) as hidden,
        make_teacher(config, logs / "teacher.log", requests.handle, hidden.handle) as teacher,
    ):
        teacher.wait_ready(120.0)
        assert hidden.peers()["producer"]
        shutil.rmtree(logs)
        os.kill(teacher.pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        while hidden.peers()["producer"] and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hidden.peers()["producer"] == ()
        with pytest.raises(TeacherDied, match=r"ended with signal 9 and could not be started again: .*teacher\.log"):
            teacher.check()
