"""Teachers that are killed are started again, and the run ends with the numbers of an undisturbed one."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kdflow.errors import PeerDied
from kdflow.transport import (
    HiddenRing,
    HiddenStatesClient,
    HiddenStatesServer,
    RequestRing,
    Seats,
    request_bytes,
)
from kdflow.types import Microbatch
from support.processes import Spawned, say
from support.run import command, metrics_of, train, workers

HIDDEN = 4


def microbatch(first_token: int) -> Microbatch:
    return Microbatch(np.arange(first_token, first_token + 6, dtype=np.int32), (6,), np.array([1, 3], np.int32))


def serve(requests: str, hidden: str, hang_at: int) -> None:
    """A teacher whose rows are the token ids; it hangs over the microbatch that begins with `hang_at`."""

    def prefill(asked: Microbatch, out: torch.Tensor) -> float:
        say(f"prefill {asked.input_ids[0]}")
        if asked.input_ids[0] == hang_at:
            time.sleep(120)
        out.copy_(torch.from_numpy(asked.input_ids[asked.loss_rows]).float()[:, None].expand(-1, HIDDEN))
        return 0.0

    server = HiddenStatesServer(
        RequestRing.attach(requests, role="consumer"), {0: HiddenRing.attach(hidden, role="producer")}, timeout_s=30.0
    )
    server.serve(HIDDEN, torch.float32, prefill)


@pytest.fixture
def rings():
    with (
        RequestRing.create(name="requests", num_slots=4, slot_bytes=request_bytes(64)) as requests,
        HiddenRing.create(name="hidden", num_slots=4, slot_bytes=4096) as hidden,
    ):
        yield requests, hidden


def ask(requests: RequestRing, hidden: HiddenRing, max_resends: int, then: Callable[[int], None]) -> list[list[float]]:
    received = []
    with (
        HiddenRing.attach(hidden.handle, role="consumer") as consumer,
        RequestRing.attach(requests.handle, role="producer") as producer,
    ):
        client = HiddenStatesClient({"": producer}, consumer, rank=0, timeout_s=60.0, max_resends=max_resends)
        for index, pending in enumerate(client.prefetch([microbatch(10 * n) for n in range(6)])):
            with pending:
                received.append(pending.tensor()[:, 0].tolist())
            then(index)
    return received


def test_what_a_dead_teacher_was_at_is_asked_again(rings) -> None:
    requests, hidden = rings
    seats = Seats(requests.handle, [hidden.handle])
    first = Spawned(serve, requests.handle, hidden.handle, 20)

    def replace() -> None:
        for asked in (0, 10, 20):
            assert first.line() == f"prefill {asked}"
        first.kill()
        second.append(Spawned(serve, requests.handle, hidden.handle, -1))

    second: list[Spawned] = []
    thread = threading.Thread(target=replace)
    thread.start()
    assert ask(requests, hidden, 1, lambda _: None) == [[10.0 * n + 1, 10.0 * n + 3] for n in range(6)]
    thread.join()
    seats.leave()
    assert second[0].join() == 0
    assert hidden.stats().reclaimed == 1


def test_without_resends_the_death_is_told(rings) -> None:
    requests, hidden = rings
    teacher = Spawned(serve, requests.handle, hidden.handle, 20)

    def kill(index: int) -> None:
        if index == 1:
            while teacher.line() != "prefill 20":
                pass
            teacher.kill()

    with pytest.raises(PeerDied):
        ask(requests, hidden, 0, kill)


def test_seats_alone_are_left_with_the_students(rings) -> None:
    requests, hidden = rings
    seats = Seats(requests.handle, [hidden.handle])
    assert not seats.has_students()
    with RequestRing.attach(requests.handle, role="producer") as student:
        assert seats.has_students()
        student.send(b"nobody reads this yet", timeout_s=1.0)
    assert not seats.has_students()
    seats.leave()
    assert hidden.peers()["producer"] == ()


@pytest.mark.parametrize("schedule", ["overlap", "colocate"])
def test_killed_teachers_change_no_number(run_config, tmp_path: Path, schedule: str) -> None:
    """Awake or asleep: after a step of which the rows are all there, a teacher that takes turns mostly sleeps."""
    exact = {"teacher__dtype": "float32", "student__compute_dtype": "float32", "training__num_steps": 40}
    straight = run_config(output_dir=tmp_path / "straight", **exact)
    assert train(straight).returncode == 0
    config = run_config(output_dir=tmp_path / "killed", transport__schedule=schedule, **exact)
    with subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith(("step 3/", "step 20/")):
                (teacher,) = workers(process.pid)
                teacher.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert sum("(signal 9) and is started again" in line for line in said) == 2
    losses = [[m["loss"] for m in metrics_of(c, "train")] for c in (straight, config)]
    assert losses[0] == losses[1]  # to the bit


def test_who_dies_asleep_comes_back_for_its_turn(run_config) -> None:
    """Turns are of 8 steps here; until the eighth is done, a new teacher would load into the student's memory."""
    config = run_config(
        data__num_eval_samples=0,
        training__num_steps=12,
        training__samples_per_step=1,
        transport__schedule="colocate",
        transport__num_slots=8,
    )
    with subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = []
        for line in process.stdout:
            if line.startswith("step ") or "is started again" in line:
                said.append(line)
            if line.startswith("step 2/"):
                (teacher,) = workers(process.pid)
                teacher.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == 0, process.stderr.read()
    assert ["is started again" in line for line in said] == [False] * 8 + [True] + [False] * 4
