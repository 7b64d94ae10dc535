"""The checkpoints of a run on disk: which there are, the newest, the best, and which may go."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from kdflow.errors import CheckpointError
from kdflow.modeling import flush

# Ranks wait for the slowest disk among them; a rank that ends is noticed at once, by its sockets.
DISK_TIMEOUT = timedelta(hours=1)
_INFO = "checkpoint.json"
_NAME = re.compile(r"step-\d+")
_WRITING, _REMOVING = "writing-", "removing-"

Fingerprint = Mapping[str, str | float]


@dataclass(frozen=True)
class CheckpointInfo:
    """What is known of a checkpoint without reading its tensors.

    Attributes:
        num_steps_done: finished steps; the position in the data follows from it.
        num_ranks: that wrote it.
        num_skipped: steps so far whose gradients were dropped.
        score: of the evaluation after its last step, lower is better; None where there was none.
        fingerprint: of student, data and teachers.
    """

    num_steps_done: int
    num_ranks: int
    num_skipped: int = 0
    score: float | None = None
    fingerprint: Fingerprint = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    info: CheckpointInfo


class CheckpointFolder:
    """A folder of `step-000123`, each of which is whole: it is written as `writing-000123` and then renamed.

    Whatever process ends at whatever moment, what is called `step-...` was written to its last byte and flushed. One
    that is to go is renamed to `removing-...` first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[Checkpoint]:
        """In the order of their steps.

        Raises:
            CheckpointError: one of them is of another version of kdflow.
        """
        steps = [p for p in self.path.glob("step-*") if _NAME.fullmatch(p.name)]
        found = [Checkpoint(p, _read_info(p)) for p in steps if (p / _INFO).is_file()]
        return sorted(found, key=lambda c: c.info.num_steps_done)

    def newest(self) -> Checkpoint | None:
        found = self.all()
        return found[-1] if found else None

    def best(self) -> Checkpoint | None:
        """The one of lowest score; among equals the latest."""
        scored = [c for c in self.all() if c.info.score is not None]
        return min(reversed(scored), key=_score, default=None)

    def find(self, name: str | None) -> Checkpoint:
        """The one called `step-N`, with or without leading zeros, or the `best`, or without a name the newest.

        Raises:
            CheckpointError: there is none; those that there are are named.
        """
        found = self.all()
        if name is None:
            chosen = found[-1] if found else None
        elif name == "best":
            chosen = self.best()
        else:
            number = name.removeprefix("step-")
            steps = {c.info.num_steps_done: c for c in found}
            chosen = steps.get(int(number)) if number.isdecimal() else None
        if chosen is None:
            names = ", ".join(c.path.name for c in found) or "none"
            raise CheckpointError(
                f"no checkpoint {name or ''} in {self.path}; there are: {names}"
                + ("; a best one needs training.keep_best and evaluations" if name == "best" else "")
            )
        return chosen

    def aside(self, num_steps_done: int) -> Path:
        """Where a checkpoint is written until it is whole."""
        return self.path / f"{_WRITING}{num_steps_done:06d}"

    def publish(self, aside: Path, info: CheckpointInfo) -> Path:
        """Gives a folder whose tensors are written and flushed its name.

        Raises:
            CheckpointError: there is one of this name.
        """
        final = self.path / f"step-{info.num_steps_done:06d}"
        if final.exists():
            raise CheckpointError(f"{final} is there already, and not of this run: move it away")
        with (aside / _INFO).open("w", encoding="utf-8") as file:
            json.dump(asdict(info), file)
            file.flush()
            os.fsync(file.fileno())
        flush(aside)
        aside.rename(final)
        flush(self.path)
        return final

    def prune(self, *, keep_last: int, keep_best: bool) -> None:
        """Removes all but the newest ones, and the best one where that is wanted."""
        found = self.all()
        kept = {c.path for c in found[-keep_last:]}
        if keep_best and (best := self.best()) is not None:
            kept.add(best.path)
        for checkpoint in found:
            if checkpoint.path not in kept:
                leaving = self.path / checkpoint.path.name.replace("step-", _REMOVING)
                checkpoint.path.rename(leaving)
                shutil.rmtree(leaving)

    def clear_remains(self) -> None:
        """Removes what processes that were ended left half written or half removed."""
        for prefix in (_WRITING, _REMOVING):
            for path in self.path.glob(f"{prefix}*"):
                shutil.rmtree(path)


def check_fingerprint(checkpoint: Checkpoint, fingerprint: Fingerprint) -> None:
    """
    Raises:
        CheckpointError: it is of another student, other data or teachers; what differs is named.
    """
    then = checkpoint.info.fingerprint
    differing = [
        f"{name} was {then.get(name)}, now it is {fingerprint.get(name)}"
        for name in sorted({*then, *fingerprint})
        if then.get(name) != fingerprint.get(name)
    ]
    if differing:
        raise CheckpointError(
            f"resume: {checkpoint.path} is of another run: {'; '.join(differing)}. Give the student, the data and "
            "the teachers it was written with, or another output_dir"
        )


def _read_info(path: Path) -> CheckpointInfo:
    try:
        return CheckpointInfo(**json.loads((path / _INFO).read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / _INFO} cannot be read ({error}): damaged or of another version of kdflow; move {path.name} away"
        ) from None


def _score(checkpoint: Checkpoint) -> float:
    assert checkpoint.info.score is not None
    return checkpoint.info.score
