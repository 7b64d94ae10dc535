"""W&B: the real package, offline; what it wrote is read from its own files."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from kdflow.config import ObserveConfig
from kdflow.errors import ConfigError
from kdflow.observe import WandbRecorder, check_wandb
from kdflow.training import EvalMetrics, StepMetrics, TeacherMetrics
from support.run import train

STEP = StepMetrics(**{**{field.name: 1.5 for field in fields(StepMetrics)}, "teachers": {}})
EVAL = EvalMetrics(0, float("nan"), 1.0, 2.5, float("nan"), 100, 1.0)
BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[bytes]:
    """Of W&B's own file, a LevelDB log: blocks of pieces with checksum, length and kind (1 and 4 end a record)."""
    data, at, record = path.read_bytes(), HEADER, b""
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):
            yield record
            record = b""


def whole_file(path: Path) -> list[Any]:
    """Records of a run that has ended; W&B's own process writes the last of them after `finish` has returned."""
    from wandb.proto import wandb_internal_pb2

    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        found = [wandb_internal_pb2.Record.FromString(data) for data in records(path)]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} was not written to its end")


def told(folder: Path) -> tuple[set[str], list[dict]]:
    """Ids of the runs of all processes, and the rows that they logged."""
    ids, rows = set(), []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in whole_file(path):
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return ids, rows


def record(folder: Path, first_step: int, last_step: int) -> None:
    """An evaluation before and after, as a run has them."""
    recorder = WandbRecorder(folder, project="tests", name="run", options={"seed": 0})
    recorder.on_eval(replace(EVAL, step=first_step))
    for step in range(first_step + 1, last_step + 1):
        recorder.on_step(replace(STEP, step=step, loss=float(step)))
    recorder.on_eval(replace(EVAL, step=last_step))
    recorder.close()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.mark.usefixtures("offline")
def test_a_run_that_goes_on_is_the_same_one_and_tells_each_step_once(tmp_path: Path) -> None:
    record(tmp_path, 0, 6)
    time.sleep(1.1)  # W&B names its folders by the second
    record(tmp_path, 4, 8)
    ids, rows = told(tmp_path)
    assert len(ids) == 1
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(n, n) for n in range(1, 9)]
    assert [row["step"] for row in rows if "eval/perplexity" in row] == [0, 6, 8]
    assert not any("eval/kl" in row for row in rows)  # not a number


@pytest.mark.usefixtures("offline")
def test_numbers_of_each_teacher(tmp_path: Path) -> None:
    code = TeacherMetrics(**{field.name: 2.5 for field in fields(TeacherMetrics)})
    recorder = WandbRecorder(tmp_path, project="tests", name="run", options={})
    recorder.on_step(replace(STEP, step=1, teachers={"code": code}))
    recorder.close()
    (row,) = told(tmp_path)[1]
    assert (row["train/loss"], row["train/code/loss"]) == (1.5, 2.5)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_wandb(ObserveConfig())
    with pytest.raises(ConfigError, match=r"wandb is not installed; pip install 'kdflow\[wandb\]'"):
        check_wandb(ObserveConfig(wandb_project="mine"))


@pytest.mark.usefixtures("offline")
def test_a_run_of_the_command_tells_wandb(run_config, tmp_path: Path) -> None:
    config = run_config(observe__wandb_project="tests", algorithm__name="sft", training__save_every=2)
    result = train(config)
    assert result.returncode == 0, result.stderr
    longer = replace(config, training=replace(config.training, num_steps=config.training.num_steps + 2))
    result = train(longer, "--resume=true")
    assert result.returncode == 0, result.stderr
    ids, rows = told(Path(config.output_dir))
    assert len(ids) == 1
    steps = [row["step"] for row in rows if "train/loss" in row]
    assert steps == list(range(1, config.training.num_steps + 3))
