"""`kdflow plan` as a command, and the rates that it takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from transformers import LlamaForCausalLM

from kdflow.config import RunConfig
from kdflow.config_file import dump_config
from kdflow.errors import ConfigError
from kdflow.plan import GPUS, Rates, load_rates
from kdflow.plan.command import make_machine
from kdflow.plan.plan import Plan, make_plan
from kdflow.plan.printing import print_plan, summary
from kdflow.plan.shapes import load_shape, load_teachers
from kdflow.plan.workload import data_workload, uniform_workload
from support.tiny import make_config


def plan(config: RunConfig, path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    path.write_text(dump_config(config), encoding="utf-8")
    command = [sys.executable, "-c", "from kdflow.cli import main; main()", "plan", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_plan_of_hundreds_of_gpus_needs_no_weights_and_no_data(run_config, tiny: Path, tmp_path: Path) -> None:
    for role in ("teacher", "student"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_bytes((tiny / role / "config.json").read_bytes())
    config = run_config(
        teacher__model=tmp_path / "teacher",
        student__model=tmp_path / "student",
        data__train="none.jsonl",
        student__num_ranks=192,
        teacher__num_workers=64,
        training__samples_per_step=768,
    )
    options = ("--rates", "H100", "--nodes", "32", "--tokens_per_sample", "128")
    result = plan(config, tmp_path / "run.yaml", *options)
    assert result.returncode == 0, result.stderr
    for part in ("master weights, fp32", "AdamW moments", "teacher's weights", "student: loss", "hours", "bottleneck"):
        assert part in result.stdout
    assert "256 x H100 on 32 nodes" in result.stdout
    assert re.search(r"microbatch +[\d,]+ tokens would fit", result.stdout)
    failed = plan(config, tmp_path / "run.yaml", "--rates", "H100")
    assert failed.returncode == 1
    assert "--tokens_per_sample N plans without the data" in failed.stderr


def test_what_a_plan_does_not_know_is_named(run_config) -> None:
    def said(**options: object) -> str:
        return summary(make(run_config(**options)))[0]

    assert said(student__cpu_offload=True, student__lora__rank=4).startswith(
        "left out    student.cpu_offload, student.lora: "
    )
    assert said(student__activation_checkpointing="full").startswith("memory")


SMALL_GPU = replace(GPUS["H100"], capacity_bytes=2.0 * 2**30)


def make(config: RunConfig, rates: Rates = GPUS["H100"], **machine) -> Plan:
    num_ranks = config.student.num_ranks
    student, teachers = load_shape(config.student.model), load_teachers(config)
    workload = uniform_workload(config, 8, num_ranks, tokens_per_sample=64, loss_share=0.5)
    return make_plan(config, student, teachers, workload, make_machine(config, rates, **machine))


def test_more_of_what_limits_is_what_the_plan_asks_for(run_config) -> None:
    one = make(run_config(student__num_ranks=4, training__samples_per_step=16))
    assert one.bottleneck.startswith("teachers: ranks wait")
    wanted = int(re.findall(r"about (\d+) workers", one.bottleneck)[0])
    enough = make(run_config(student__num_ranks=4, training__samples_per_step=16, teacher__num_workers=wanted + 1))
    assert enough.bottleneck.startswith("students, which never wait")
    assert enough.tokens_per_s > 1.2 * one.tokens_per_s
    assert enough.hours < one.hours
    shared = make(run_config(), num_gpus=1)
    assert shared.sharing
    assert shared.bottleneck.startswith("teacher and student share a device")
    assert shared.needed_bytes == shared.student_memory.total + shared.teacher_memory[""].total


def test_turns_need_the_memory_of_the_larger_one(run_config) -> None:
    together = make(run_config(training__samples_per_step=8), num_gpus=1)
    turns = make(run_config(training__samples_per_step=8, transport__schedule="colocate"), num_gpus=1)
    assert "ring" not in {part for part, size in turns.student_memory.parts.items() if size}
    student, teacher = turns.student_memory, turns.teacher_memory[""]
    assert turns.needed_bytes == max(student.total + teacher.resting, student.resting + teacher.total)
    assert turns.needed_bytes < together.needed_bytes
    assert turns.bottleneck.startswith("turns: for ")
    text = StringIO()
    print_plan(turns, Console(file=text, width=120))
    assert "the larger of both turns" in text.getvalue()


def test_several_teachers_are_all_counted(run_config, tiny: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    LlamaForCausalLM(make_config(num_layers=1, hidden_size=64, tied=False)).save_pretrained(wide)
    teachers = {"math": {"model": str(tiny / "teacher")}, "code": {"model": str(wide), "num_workers": 2}}
    sources = [{"source": name, "weight": weight, "teacher": name} for name, weight in (("math", 3), ("code", 1))]
    options = {"training__samples_per_step": 32, "student__num_ranks": 2, "data__train": json.dumps(sources)}
    config = run_config(teachers=json.dumps(teachers), **options)
    found = make(config)
    assert found.machine.num_devices == 2 + 1 + 2
    names = [p.teacher_name for step in found.workload.steps for ranks in step for p in ranks for _ in p.lengths]
    assert names.count("math") == 3 * names.count("code") == 24 * len(found.workload.steps)
    assert found.student_memory.parts["teachers' heads"] == 2 * 384 * (48 + 64)
    assert found.student_memory.parts["ring"] == 4 * 256 * 64 * 2
    alone = make(run_config(teacher__model=wide, **{**options, "data__train": "x"}))
    assert found.teacher_memory["code"].parts == alone.teacher_memory[""].parts
    assert set(found.outcome.busy) == {"math", "code"}
    assert found.step_s["teacher math: prefill"] > found.step_s["teacher code: prefill"] > 0
    # On one device everybody is there.
    shared = make(config, num_gpus=1)
    parts = (shared.student_memory.total, shared.teacher_memory["math"].total, shared.teacher_memory["code"].total)
    assert shared.needed_bytes == pytest.approx(2 * parts[0] + parts[1] + 2 * parts[2])
    slow = make(run_config(teachers=json.dumps(teachers), **{**options, "student__num_ranks": 4}))
    assert re.match(r"teachers: ranks wait .* about \d+ workers of teacher math instead of 1", slow.bottleneck)
    text = StringIO()
    print_plan(found, Console(file=text, width=120))
    for part in ("teacher math  ", "memory of teacher code", "teacher code: prefill"):
        assert part in text.getvalue()


@pytest.mark.parametrize("schedule", ["overlap", "colocate"])
def test_a_run_without_a_teacher_is_one_of_students_alone(run_config, tiny: Path, schedule: str) -> None:
    options = {"student__num_ranks": 2, "training__samples_per_step": 8, "transport__schedule": schedule}
    taught = make(run_config(**options))
    alone = make(run_config(algorithm__name="sft", teacher__model="", **options))
    ignored = make(run_config(algorithm__name="sft", teacher__num_workers=3, **options))
    assert (alone.machine.num_devices, taught.machine.num_devices) == (2, 3)
    assert (alone.teachers, alone.teacher_memory, alone.outcome.busy) == ({}, {}, {})
    left = {part: size for part, size in alone.student_memory.parts.items() if size}
    assert not {"ring", "teachers' heads"} & set(left)
    assert set(alone.step_s) == {f"student: {part}" for part in ("forward", "loss", "backward", "optimizer")}
    assert alone.step_s["student: loss"] < taught.step_s["student: loss"]
    for part in ("forward", "backward", "optimizer"):
        assert alone.step_s[f"student: {part}"] == taught.step_s[f"student: {part}"]
    steps = alone.outcome.step_seconds
    assert steps == pytest.approx([sum(alone.step_s.values())] * len(steps))
    assert alone.outcome.wait == 0.0
    assert alone.needed_bytes == alone.student_memory.total
    assert not alone.sharing
    assert alone.bottleneck.startswith("students, who learn from text alone; ")
    # A teacher that the run would not start makes no difference.
    assert (ignored.outcome, ignored.needed_bytes, ignored.machine) == (
        alone.outcome,
        alone.needed_bytes,
        alone.machine,
    )
    text = StringIO()
    print_plan(alone, Console(file=text, width=200))
    assert "teacher" not in text.getvalue()
    assert "students alone, of" in text.getvalue()
    assert re.search(r"busy +students \d+%\n", text.getvalue())
    shared = make(run_config(algorithm__name="sft", **options), num_gpus=1)
    assert shared.needed_bytes == 2 * shared.student_memory.total


def test_the_command_plans_runs_without_a_teacher(run_config, tiny: Path, tmp_path: Path) -> None:
    config = run_config(algorithm__name="sft", teacher__model="", data__cache_dir=tmp_path / "cache")
    result = plan(config, tmp_path / "run.yaml", "--rates", "H100")
    assert result.returncode == 0, result.stderr
    assert "students, who learn from text alone" in result.stdout
    source = tiny / "conversations.jsonl"
    assert result.stderr == f"data: {source} is tokenised, once: its tokens are kept in {tmp_path / 'cache'}\n"
    again = plan(config, tmp_path / "run.yaml", "--rates", "H100")
    assert (again.stdout, again.stderr) == (result.stdout, "")


def test_teachers_that_a_plan_refuses(run_config, tiny: Path, tmp_path: Path) -> None:
    def told(**options: object) -> str:
        result = plan(run_config(**options), tmp_path / "run.yaml", "--rates", "H100", "--tokens_per_sample", "64")
        return result.stderr if result.returncode else "planned"

    assert "teacher.model: algorithm vanilla learns from a teacher, and none is given" in told(teacher__model="")
    base = {"teacher__model": "", "teacher__backend": "base", "student__lora__rank": 4}
    assert "teacher.backend: base has no process of its own" in told(**base)
    assert told(algorithm__name="sft", **base) == "planned"


def test_several_teachers_of_a_run_that_asks_none(run_config, tiny: Path) -> None:
    """Samples still name theirs, and are packed by it."""
    teachers = {name: {"model": str(tiny / "teacher")} for name in ("math", "code")}
    sources = [{"source": name, "teacher": name} for name in teachers]
    options = {"teachers": json.dumps(teachers), "data__train": json.dumps(sources), "training__samples_per_step": 8}
    found = make(run_config(algorithm__name="sft", **options))
    assert {p.teacher_name for step in found.workload.steps for ranks in step for p in ranks} == {"math", "code"}
    assert found.machine.num_devices == 1
    assert found.outcome.busy == {}


def test_the_largest_budget_is_the_last_that_fits(run_config) -> None:
    config = run_config(training__samples_per_step=8)
    found = make(config, SMALL_GPU)
    assert found.largest_budget is not None
    for budget, fits in ((found.largest_budget, True), (found.largest_budget + 256, False)):
        # One microbatch of exactly that many tokens, half of them in the loss.
        options = {"training__tokens_per_microbatch": budget, "data__max_length": budget}
        full = run_config(training__samples_per_step=1, **options)
        workload = uniform_workload(full, 5, 1, tokens_per_sample=budget, loss_share=0.5)
        shapes = load_shape(config.student.model), load_teachers(config)
        # The ring's slots are of the configured budget: that is left as it was.
        planned = make_plan(
            run_config(training__samples_per_step=1), *shapes, workload, make_machine(config, SMALL_GPU)
        )
        assert planned.fits is fits, (budget, planned.needed_bytes, planned.capacity_bytes)


def test_the_workload_is_what_the_run_packs(run_config) -> None:
    from kdflow.launcher.prepare import prepare
    from kdflow.training import plan as run_plan

    config = run_config(student__num_ranks=2, data__num_eval_samples=0)
    prepared = prepare(config)
    steps = [list(run_plan(config, prepared.train, None, rank=rank, num_ranks=2)) for rank in range(2)]
    workload = data_workload(config, 4, 2)
    for number, step in enumerate(workload.steps):
        for rank in range(2):
            ours = [(p[rank].lengths, p[rank].num_rows) for p in step]
            assert ours == [(m.sequence_lengths, m.num_loss_tokens) for m in steps[rank][number].microbatches]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "not JSON"),
        ('{"like": "H900"}', "like: expected one of A100, H100"),
        ('{"matmul_flops": 1}', "missing ['attention_flops', 'capacity_bytes'"),
        ('{"like": "H100", "matmul_flop": 1}', "unknown ['matmul_flop']"),
        ('{"kind": "environment", "gpu": null}\n', "expected rows of `python -m bench ceilings`"),
        ('{"kind": "environment"}\n{"kind": "row"}\n', "expected rows of `python -m bench ceilings`, got others"),
        ("[1]", "expected a JSON object, got list"),
        ('{"like": "H100", "matmul_flops": "fast"}', "matmul_flops: expected a number above 0, got 'fast'"),
        ('{"like": "H100", "memory_bytes": 0}', "memory_bytes: expected a number above 0, got 0"),
        ('{"like": "H100", "shared": 1}', "shared: expected true or false, got 1"),
    ],
)
def test_bad_rates(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_rates(str(path))
    assert message in str(error.value)
    with pytest.raises(ConfigError, match='did you mean "H100"'):
        load_rates("H10")


def test_rates_of_a_file_and_of_a_measurement(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"like": "H200", "matmul_flops": 5e14}))
    rates = load_rates(str(path))
    assert rates.matmul_flops == 5e14
    assert rates.capacity_bytes == GPUS["H200"].capacity_bytes
    environment = {"kind": "environment", "gpu": None, "cpu": {"model": "some CPU", "memory_gib": 16.0}}
    rows = [
        {"suite": "ceilings", "params": {"rate": rate, "rate_per_work": factor}, "work": 10.0, "median_s": 2.0}
        for rate, factor in (
            ("matmul_flops", 1),
            ("attention_flops", 1),
            ("operator_bytes", 1),
            ("memory_bytes", 2),
            ("loss_logits", 1),
        )
    ]
    measured = tmp_path / "ceilings.jsonl"
    measured.write_text("".join(json.dumps(record) + "\n" for record in (environment, *rows)))
    rates = load_rates(str(measured))
    assert (rates.matmul_flops, rates.memory_bytes, rates.shared) == (5.0, 10.0, True)
    assert rates.capacity_bytes == 16 * 2**30
