"""What a run's timeline.json holds."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any


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


def assert_turns(path: Path, num_workers: int) -> None:
    """Each worker slept several times, and no student computed a loss while a teacher prefilled."""
    spans = [event for events in tracks(path).values() for event in events]

    def named(*names: str) -> list[dict[str, Any]]:
        return [span for span in spans if span["name"] in names]

    assert len(named("asleep")) >= 3 * num_workers
    prefills, trained = named("prefill"), named("forward", "loss", "backward")
    assert prefills
    assert trained
    assert not [(p, t) for p in prefills for t in trained if p["ts"] < end_of(t) and t["ts"] < end_of(p)]
