"""Nothing that is told of a run ends it: where there is no room, lines are lost, and those that are there are whole."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kdflow.errors import ConfigError
from kdflow.observe import Progress, Recorder, Terminal, WandbRecorder
from kdflow.training import EvalMetrics, StepMetrics
from support.disk import room
from support.run import train

STEP = StepMetrics(**{**{field.name: 1.5 for field in fields(StepMetrics)}, "teachers": {}})
EVAL = EvalMetrics(0, 0.5, 1.0, 2.5, 0.5, 100, 1.0)
FULL = Path("/dev/full")


def told_steps(folder: Path) -> tuple[list[int], list[int]]:
    """In the lines, all of which are whole, and on TensorBoard."""
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [m["step"] for m in lines if m["kind"] == "train"], [e.step for e in board.Scalars("train/loss")]


def test_lines_go_on_when_there_is_room_again(tmp_path: Path) -> None:
    said: list[str] = []
    recorder = Recorder(tmp_path, say=said.append)

    def steps(first: int, last: int) -> None:
        for step in range(first, last + 1):
            recorder.on_step(replace(STEP, step=step))

    with room(3_000):
        steps(1, 20)
        recorder.on_eval(replace(EVAL, step=20))
        recorder.on_warning("look here" * 300)
        sizes = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
    assert len(sizes) == 2
    assert all(0 < size < 3_000 for size in sizes)  # the half of a line that had room was taken back
    assert len(said) == 2
    for text, name in zip(sorted(said), ("metrics.jsonl", "events.out"), strict=True):
        assert name in text
        assert text.endswith("cannot be written (File too large); training goes on without it, and tries again")
    steps(21, 25)
    with room(1_000):
        steps(26, 27)
        recorder.close()
    assert len(said) == 2
    for found in told_steps(tmp_path):
        num_first = len(found) - 5
        assert 1 < num_first < 20
        assert found == [*range(1, num_first + 1), *range(21, 26)]


def test_a_disk_that_is_full_from_the_start(tmp_path: Path) -> None:
    """The files can be opened, and what TensorBoard needs first is written with the first point."""
    said: list[str] = []
    recorder = Recorder(tmp_path, first_step=3, say=said.append)
    with room(0):
        recorder.on_step(replace(STEP, step=4))
    recorder.on_step(replace(STEP, step=5))
    recorder.close()
    assert len(said) == 2
    assert told_steps(tmp_path) == ([5], [5])


def test_files_that_cannot_be_opened_end_the_run_at_its_start(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").touch()
    with pytest.raises(ConfigError, match=r"output_dir: the metrics cannot be written \(.*File exists.*make room in"):
        Recorder(tmp_path)


def test_progress_goes_on_when_its_file_has_no_room() -> None:
    file = FULL.open("w")
    progress = Progress(4, first_step=0, log_every=1, console=Terminal(file=file))
    progress.on_step(replace(STEP, step=1))
    progress.on_eval(replace(EVAL, step=1))
    progress.on_warning("no room")
    progress.close()
    with suppress(OSError):
        file.close()


def test_what_wandb_was_told_is_kept_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    said: list[str] = []
    recorder = WandbRecorder(tmp_path, project="tests", name="run", options={}, say=said.append)
    aside, state = (tmp_path / "wandb" / name for name in ("run.writing", "run.json"))
    recorder.on_step(replace(STEP, step=1))
    aside.symlink_to(FULL)
    recorder.on_step(replace(STEP, step=2))
    recorder.on_eval(replace(EVAL, step=2))
    assert json.loads(state.read_text())["train"] == 1
    aside.unlink()
    recorder.on_step(replace(STEP, step=3))
    recorder.close()
    assert said == [
        f"{state} cannot be written (No space left on device); training goes on without it, and tries again"
    ]
    told = json.loads(state.read_text())
    assert (told["train"], told["eval"]) == (3, 2)


def test_a_run_comes_to_its_end_without_room_for_metrics(run_config) -> None:
    config = run_config(algorithm__name="sft", training__log_every=1)
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "metrics.jsonl").symlink_to(FULL)
    result = train(config)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert "Traceback" not in result.stderr
    assert (folder / "model" / "model.safetensors").is_file()
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [1, 2, 3, 4]
