"""A run's timeline: real spans of real processes, on one clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdflow.config import ProfileConfig
from kdflow.errors import DataError
from kdflow.tracing import OFF, Trace, merged_timeline, open_shared_trace, recorders, share_trace
from kdflow.tracing.spans import HostSpans, SpanFile
from kdflow.tracing.timeline import Span, read_spans, ring_spans
from support.run import train
from support.timeline import assert_nested, end_of, tracks

PHASES = {
    "student": {
        "step",
        "microbatch",
        "request",
        "forward",
        "receive wait",
        "loss",
        "backward",
        "optimizer step",
        "eval",
    },
    "teacher": {"wait for slot", "prefill", "publish"},
    "ring": {"filling", "being read"},
}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_writes_a_timeline_of_teachers_rings_and_students(run_config, num_ranks: int) -> None:
    config = run_config(
        profile__timeline="true",
        profile__num_steps=1,
        profile__first_step=2,
        student__num_ranks=num_ranks,
        teacher__num_workers=num_ranks,
        transport__num_slots=2,
    )
    result = train(config)
    assert result.returncode == 0, result.stderr
    folder = Path(config.output_dir, "profile")
    found = tracks(folder / "timeline.json")
    processes = {process for process, _ in found}
    assert processes == {f"{role} {i}" for role in PHASES for i in range(num_ranks)}
    assert {t for process, t in found if process == "ring 0"} == {"slot 0", "slot 1"}
    for events in found.values():
        assert_nested(events)
    for role, names in PHASES.items():
        assert names <= {
            e["name"] for (process, _), events in found.items() if process.startswith(role) for e in events
        }
    student = found["student 0", "host"]
    steps = [e for e in student if e["name"] == "step"]
    assert [e["args"]["step"] for e in steps] == [1, 2, 3, 4]
    covered = sum(
        e["dur"] for e in student if e["name"] in ("forward", "loss", "backward", "receive wait", "optimizer step")
    )
    inside = [e for e in student if e["name"] in ("step", "eval")]
    assert covered > 0.5 * sum(e["dur"] for e in inside)
    # What a student reads has been filled before, by a clock of another process.
    for rank in range(num_ranks):
        received = {
            e["args"]["ticket"]: end_of(e) for e in found[f"student {rank}", "host"] if e["name"] == "receive wait"
        }
        prefilled = {
            e["args"]["ticket"]: end_of(e)
            for (process, _), events in found.items()
            if process.startswith("teacher")
            for e in events
            if e["name"] == "prefill" and e["args"]["rank"] == rank
        }
        assert received.keys() == prefilled.keys()
        assert all(prefilled[ticket] <= moment for ticket, moment in received.items())
    for index in range(num_ranks):
        student_trace = json.loads((folder / f"torch-student-{index}.json").read_text())["traceEvents"]
        names = {event.get("name") for event in student_trace}
        assert {"forward", "loss", "backward", "optimizer step"} <= names
        assert "ProfilerStep#1" in names
        assert "ProfilerStep#2" not in names
        assert any(str(name).startswith("aten::") for name in names)
        assert "prefill" in (folder / f"torch-teacher-{index}.json").read_text()


def test_a_run_without_the_flag_leaves_nothing(run_config) -> None:
    config = run_config(training__num_steps=1, data__num_eval_samples=0)
    assert train(config).returncode == 0
    assert not Path(config.output_dir, "profile").exists()
    with OFF.span("step"):
        OFF.phase("forward")
    OFF.close()


def test_spans_that_an_error_leaves_open_are_closed(tmp_path: Path) -> None:
    path = tmp_path / "spans.jsonl"

    def fail(trace: Trace) -> None:
        with trace.span("step", step=1):
            trace.phase("forward")
            trace.phase("backward")
            raise RuntimeError("no")

    with Trace([HostSpans(SpanFile(path, "student", 0, "host"))]) as trace:
        with pytest.raises(RuntimeError):
            fail(trace)
        trace.phase("save")
    assert [(s.name, s.args) for s in read_spans(path)] == [
        ("forward", {}),
        ("backward", {}),
        ("step", {"step": 1}),
        ("save", {}),
    ]
    with path.open("a") as file:
        file.write('["half a li')  # a process that was killed
    assert len(read_spans(path)) == 4
    path.write_text('{"role": "stu')
    assert read_spans(path) == []
    path.write_text('{"kind": "train"}\n')
    with pytest.raises(DataError, match="expected spans of a run"):
        read_spans(path)


def test_who_has_written_no_span_ends_no_run(tmp_path: Path) -> None:
    """One that was killed before it wrote its file out, and one that was before it had written a byte."""
    with merged_timeline(ProfileConfig(timeline=True), tmp_path, 4, 1):
        (tmp_path / "spans").mkdir()
        (tmp_path / "spans" / "teacher-0-1.jsonl").touch()
        killed = SpanFile(tmp_path / "spans" / "teacher-0-2.jsonl", "teacher", 0, "host")
        killed.add("prefill", 1, 2, {})
        with Trace([HostSpans(SpanFile(tmp_path / "spans" / "student-0-3.jsonl", "student", 0, "host"))]) as trace:
            trace.phase("save")
    assert tracks(tmp_path / "timeline.json").keys() == {("student 0", "host")}


@pytest.mark.parametrize("ranks_per_ring", [1, 2])
def test_slots_follow_from_both_sides(ranks_per_ring: int) -> None:
    def teacher(name: str, start: int, end: int, ticket: int) -> Span:
        return Span("teacher", 3, "host", name, start, end, {"rank": 1, "ticket": ticket})

    def student(name: str, start: int, end: int, ticket: int, index: int = ranks_per_ring) -> Span:
        return Span("student", index, "host", name, start, end, {"ticket": ticket})

    spans = [
        teacher("wait for slot", 0, 10, 5),
        teacher("publish", 50, 55, 5),
        student("receive wait", 60, 65, 5),
        student("release", 90, 91, 5),
        student("receive wait", 60, 70, 5, index=ranks_per_ring + 1),  # has a ring of its own, or shares this one
        student("release", 94, 95, 5, index=ranks_per_ring + 1),
        teacher("wait for slot", 60, 70, 6),  # nobody took this one
        teacher("publish", 80, 85, 6),
    ]
    assert [(s.index, s.track, s.name, s.start_ns, s.end_ns) for s in ring_spans(spans, 4, ranks_per_ring)] == [
        (1, "slot 1", "filling", 10, 55),
        (1, "slot 1", "full", 55, 65),
        (1, "slot 1", "being read", 65, 90),
    ]


def test_where_a_teachers_host_is_ahead_its_gpu_says_when() -> None:
    """Whichever of its tracks is read first."""

    def teacher(track: str, name: str, end: int) -> Span:
        return Span("teacher", 0, track, name, 0, end, {"rank": 0, "ticket": 2})

    queued = [teacher("engine", "wait for slot", 10), teacher("engine", "publish", 15)]
    came = [teacher("GPU", "wait for slot", 40), teacher("GPU", "publish", 50)]
    student = [
        Span("student", 0, "host", name, start, end, {"ticket": 2})
        for name, start, end in (("receive wait", 0, 60), ("release", 90, 91))
    ]
    expected = [("filling", 40, 50), ("full", 50, 60), ("being read", 60, 90)]
    for order in (queued + came, came + queued):
        assert [(s.name, s.start_ns, s.end_ns) for s in ring_spans(order + student, 4)] == expected


def test_a_process_below_another_has_a_track_of_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(recorders.VARIABLE, "")  # so that what share_trace sets is taken back
    monkeypatch.delenv(recorders.VARIABLE)
    assert open_shared_trace("engine", torch.device("cpu")) is OFF
    share_trace(ProfileConfig(timeline=True), tmp_path, "teacher", 3)
    with open_shared_trace("engine", torch.device("cpu")) as trace:
        trace.phase("prefill", tokens=5)
    (path,) = (tmp_path / "profile" / "spans").iterdir()
    (span,) = read_spans(path)
    assert (span.role, span.index, span.track, span.name, span.args) == (
        "teacher",
        3,
        "engine",
        "prefill",
        {"tokens": 5},
    )
