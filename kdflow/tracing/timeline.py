"""The timeline of a run: the spans of all its processes in one file of Chrome's trace-event format.

ui.perfetto.dev and chrome://tracing open it. Students, teachers and rings each have a group of tracks;
what a ring's slots held, and when, follows from the spans of both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdflow.config import ProfileConfig
from kdflow.errors import DataError
from kdflow.tracing.spans import GPU, HOST

# Whose tracks come first: along the way of the hidden states.
ROLES = ("rollout", "teacher", "ring", "student")
MAX_INDEX = 1000  # processes of a role, for the numbers that stand for them


@dataclass(frozen=True)
class Span:
    """What a track did from start to end, in nanoseconds of the node's monotonic clock."""

    role: str
    index: int
    track: str
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, int]


@contextmanager
def merged_timeline(config: ProfileConfig, folder: Path, num_slots: int, ranks_per_ring: int) -> Iterator[None]:
    """Merges what the processes wrote meanwhile, however the run ends, into `timeline.json`.

    Args:
        folder: where the processes write `spans/`.
        num_slots: of each ring.
        ranks_per_ring: neighbouring students that share microbatches; the first of them has the ring.
    """
    if not config.timeline:
        yield
        return
    for old in (folder / "spans").glob("*.jsonl"):
        old.unlink()
    try:
        yield
    finally:
        merge(folder, num_slots, ranks_per_ring)


def merge(folder: Path, num_slots: int, ranks_per_ring: int = 1) -> None:
    """Writes `timeline.json` from `spans/`, where there are any."""
    spans = [span for path in sorted((folder / "spans").glob("*.jsonl")) for span in read_spans(path)]
    if spans:
        write_timeline(folder / "timeline.json", [*spans, *ring_spans(spans, num_slots, ranks_per_ring)])


def read_spans(path: Path) -> list[Span]:
    """The spans of one process; a last line that was not written to its end, if only the first, is left out.

    Raises:
        DataError: the file is something else.
    """
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    if not lines:
        return []
    try:
        whose, *found = map(json.loads, lines)
        role, index, track = whose["role"], whose["index"], whose["track"]
        return [Span(role, index, track, *values) for values in found]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: expected spans of a run, as --profile.timeline=true has them written") from None


def ring_spans(spans: list[Span], num_slots: int, ranks_per_ring: int = 1) -> list[Span]:
    """What each slot did for each record: filling, full, being read.

    The student's microbatches are numbered as its requests are, and a request's number is its slot.
    """
    # Where a teacher's host is ahead of its GPU, the GPU's times come last and count.
    teachers = sorted((s for s in spans if s.role == "teacher"), key=lambda s: s.track == GPU)
    reserved = {_record(s): s.end_ns for s in teachers if s.name == "wait for slot"}
    published = {_record(s): s.end_ns for s in teachers if s.name == "publish"}
    found: list[Span] = []
    host = [s for s in spans if s.role == "student" and s.track == HOST and s.index % ranks_per_ring == 0]
    received = {_record(s, ranks_per_ring): s.end_ns for s in host if s.name == "receive wait"}
    released = {_record(s, ranks_per_ring): s.start_ns for s in host if s.name == "release"}
    for key, end in released.items():
        ring, ticket = key
        if not (key in reserved and key in published and key in received):
            continue
        # The student may have the record before the teacher's call that published it returns.
        full = min(published[key], received[key])
        track, args = f"slot {ticket % num_slots}", {"ticket": ticket}
        found += [
            Span("ring", ring, track, name, start, stop, args)
            for name, start, stop in (
                ("filling", reserved[key], full),
                ("full", full, received[key]),
                ("being read", received[key], end),
            )
            if stop > start
        ]
    return found


def _record(span: Span, ranks_per_ring: int = 1) -> tuple[int, int]:
    """Ring and ticket; teachers write in their arguments whose ring it is."""
    return span.args.get("rank", span.index // ranks_per_ring), span.args["ticket"]


def write_timeline(path: Path, spans: list[Span]) -> None:
    """The spans as complete events, microseconds from the first one on, with names for processes and tracks."""
    begin = min(span.start_ns for span in spans)
    tracks = sorted({(ROLES.index(s.role), s.index, s.track, s.role) for s in spans}, key=_natural)
    numbers: dict[tuple[str, int, str], tuple[int, int]] = {}
    events: list[dict[str, Any]] = []
    for number, (order, index, track, role) in enumerate(tracks):
        pid = order * MAX_INDEX + index + 1
        numbers[role, index, track] = pid, number
        events += [
            _named("process_name", pid, 0, name=f"{role} {index}"),
            _named("process_sort_index", pid, 0, sort_index=pid),
            _named("thread_name", pid, number, name=track),
            _named("thread_sort_index", pid, number, sort_index=number),
        ]
    for span in sorted(spans, key=lambda s: (s.start_ns, -s.end_ns)):
        pid, tid = numbers[span.role, span.index, span.track]
        events.append(
            {
                "name": span.name,
                "cat": span.role,
                "ph": "X",
                "ts": (span.start_ns - begin) / 1000,
                "dur": (span.end_ns - span.start_ns) / 1000,
                "pid": pid,
                "tid": tid,
                "args": span.args,
            }
        )
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    aside = path.with_suffix(".writing")
    aside.write_text(text, encoding="utf-8")
    aside.rename(path)


def _natural(track: tuple[int, int, str, str]) -> tuple[int, int, int, str]:
    """Slot 10 after slot 9."""
    order, index, name, _ = track
    return order, index, len(name), name


def _named(kind: str, pid: int, tid: int, **args: object) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": args}
