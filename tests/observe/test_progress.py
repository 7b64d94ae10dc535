from __future__ import annotations

import math
from dataclasses import fields, replace
from io import StringIO

import pytest

from kdflow.observe import Progress, Terminal
from kdflow.observe.progress import RECENT_STEPS, TimeLeft
from kdflow.training import EvalMetrics, StepMetrics, TeacherMetrics

STEP = StepMetrics(**{**{field.name: 1.5 for field in fields(StepMetrics)}, "num_skipped": 0, "teachers": {}})


def left(times: list[float], num_steps: int) -> list[float]:
    estimate = TimeLeft(num_steps)
    return [estimate.after(replace(STEP, step=i + 1, step_s=s)) for i, s in enumerate(times)]


def test_time_left_is_that_of_the_mean_of_recent_steps() -> None:
    assert left([10.0], 3) == [20.0]  # nothing else is known yet
    assert left([10.0, 2.0, 4.0], 5) == pytest.approx([40.0, 6.0, 6.0])
    times = [10.0, *[1.0] * 5, *[3.0] * RECENT_STEPS]
    assert left(times, len(times) + 10)[-1] == pytest.approx(30.0)


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = StringIO()
    progress = Progress(4, first_step=0, log_every=2, console=Terminal(file=out))
    for step in (1, 2, 3):
        progress.on_step(replace(STEP, step=step, step_s=2.0))
    progress.on_eval(EvalMetrics(3, 0.5, 1.0, 2.71828, 0.25, 100, 1.0))
    progress.close()
    first, second = out.getvalue().splitlines()
    assert first.startswith("step 2/4  loss 1.5000")
    assert first.endswith("4 s left")
    assert second == (
        "eval after 3 steps: KL(teacher||student) 0.5000 nats  perplexity 2.72  top-1 agreement 25.0%  (100 tokens)"
    )


def test_losses_of_each_teacher_stand_behind_that_of_all() -> None:
    out = StringIO()
    progress = Progress(4, first_step=0, log_every=1, console=Terminal(file=out))
    code, maths = (TeacherMetrics(loss, kl, 1.0, 1.0, 1.0, 0.5, 10) for loss, kl in ((0.5, 0.25), (2.0, 1.5)))
    teachers = {"code": code, "maths": maths}
    progress.on_step(replace(STEP, step=1, teachers=teachers))
    progress.on_eval(EvalMetrics(1, 0.5, 1.0, 2.71828, 0.25, 100, 1.0, teachers))
    progress.close()
    step, evaluation = out.getvalue().splitlines()
    assert "loss 1.5000 (code 0.5000, maths 2.0000)  grad norm" in step
    assert "0.5000 nats (code 0.2500, maths 1.5000)  perplexity" in evaluation


def test_what_there_is_only_with_a_teacher_is_left_out_without() -> None:
    out = StringIO()
    progress = Progress(4, first_step=0, log_every=1, console=Terminal(file=out))
    progress.on_step(replace(STEP, step=1, teacher_tokens_per_s=0.0, num_skipped=1))
    progress.on_eval(EvalMetrics(1, math.nan, 1.0, 2.71828, math.nan, 100, 1.0))
    text = "no room in runs/[a][/b]/:smile:/" + "long/" * 50
    progress.on_warning(text)
    progress.close()
    step, evaluation, warning = out.getvalue().splitlines()
    assert "teacher" not in step
    assert step.endswith("skipped 1")
    assert evaluation == "eval after 1 steps: perplexity 2.72  (100 tokens)"
    assert warning == f"warning: {text}"
