from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdflow.observe import Recorder
from kdflow.training import EvalMetrics, StepMetrics, TeacherMetrics

STEP = StepMetrics(**{**{field.name: 1.5 for field in fields(StepMetrics)}, "teachers": {}})
EVAL = EvalMetrics(0, math.nan, 1.0, math.e, math.nan, 100, 1.0)


def lines(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def record(folder: Path, first_step: int, last_step: int, loss: float) -> None:
    """An evaluation before and after, as a run has them."""
    recorder = Recorder(folder, first_step=first_step)
    recorder.on_eval(replace(EVAL, step=first_step))
    for step in range(first_step + 1, last_step + 1):
        recorder.on_step(replace(STEP, step=step, loss=loss))
    recorder.on_eval(replace(EVAL, step=last_step))
    recorder.close()


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.on_step(replace(STEP, step=1, loss=math.nan, grad_norm=math.inf))
    recorder.on_warning("look here")
    recorder.close()
    step, warning = lines(tmp_path)
    assert (step["kind"], step["loss"], step["grad_norm"], step["kd_loss"]) == ("train", None, None, 1.5)
    assert (warning["kind"], warning["text"]) == ("warning", "look here")


def test_numbers_of_each_teacher(tmp_path: Path) -> None:
    code = TeacherMetrics(**{**{field.name: 2.5 for field in fields(TeacherMetrics)}, "kd_loss": math.nan})
    recorder = Recorder(tmp_path)
    recorder.on_step(replace(STEP, step=1, teachers={"code": code}))
    recorder.on_eval(replace(EVAL, step=1, teachers={"code": code}))
    recorder.on_eval(replace(EVAL, step=2))
    recorder.close()
    step, evaluation, alone = lines(tmp_path)
    for line in (step, evaluation):
        assert line["teachers"] == {"code": {**asdict(code), "kd_loss": None}}
    assert "teachers" not in alone
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/code/loss")] == [(1, 2.5)]


def test_a_run_that_goes_on_tells_each_step_once(tmp_path: Path) -> None:
    record(tmp_path, 0, 6, loss=1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 7, "lo')  # where it was killed
    record(tmp_path, 4, 8, loss=2.0)
    found = lines(tmp_path)
    steps = [(m["step"], m["loss"]) for m in found if m["kind"] == "train"]
    assert steps == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)]
    assert [m["step"] for m in found if m["kind"] == "eval"] == [0, 4, 8]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == steps


def test_lines_of_others_stay(tmp_path: Path) -> None:
    others = ["12", '{"a": 1}', '{"kind": "train"}', '{"kind": ["train"], "step": 9}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(others))  # the last one without its end
    record(tmp_path, 0, 1, loss=2.0)
    found = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert found[:4] == others
    assert len(found) == 7


def test_a_run_from_its_beginning_forgets_what_was_told(tmp_path: Path) -> None:
    record(tmp_path, 0, 2, loss=1.0)
    record(tmp_path, 0, 1, loss=2.0)
    assert [(m["step"], m.get("loss")) for m in lines(tmp_path)] == [(0, None), (1, 2.0), (1, None)]
