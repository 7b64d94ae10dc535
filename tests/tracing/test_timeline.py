"""A run's timeline: real spans of real processes, on one clock."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from kdflow.errors import DataError
from kdflow.tracing import OFF, Trace
from kdflow.tracing.spans import HostSpans, SpanFile
from kdflow.tracing.timeline import Span, read_spans, ring_spans
from support.run import train

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


def tracks(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The complete events of each (process, track), by their start."""
    events = json.loads(path.read_text())["traceEvents"]
    named = {(e["name"], e["pid"], e["tid"]): e["args"].get("name") for e in events if e["ph"] == "M"}
    found = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            pid, tid = event["pid"], event["tid"]
            found[named["process_name", pid, 0], named["thread_name", pid, tid]].append(event)
    return found


def end_of(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def assert_nested(events: list[dict[str, Any]]) -> None:
    """Each begins no earlier than the one before, and lies wholly inside or after every other one."""
    open_until: list[float] = []
    for event in events:
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        while open_until and open_until[-1] <= event["ts"] + 1e-3:
            open_until.pop()
        assert not open_until or end_of(event) <= open_until[-1] + 1e-3, event
        open_until.append(end_of(event))
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)


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
    path.write_text('{"kind": "train"}\n')
    with pytest.raises(DataError, match="expected spans of a run"):
        read_spans(path)


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
