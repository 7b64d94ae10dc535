"""Checkpoints of a run: written aside, then renamed, so that an old one is never half new."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as dcp_loader
import torch.distributed.checkpoint.state_dict_saver as dcp_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_state_dict,
)

from kdflow.errors import CheckpointError
from kdflow.student.fsdp2 import FSDP2Student

_PROGRESS = "progress.json"


class CheckpointStore:
    """Checkpoints `step-000123` in one folder, the newest kept.

    A checkpoint holds weights, optimizer, random state and the number of finished
    steps, from which the position in the data follows.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def newest(self) -> Path | None:
        found = sorted(p for p in self._folder.glob("step-*") if (p / _PROGRESS).is_file())
        return found[-1] if found else None

    def save(self, student: FSDP2Student, num_steps_done: int) -> Path:
        """Writes a checkpoint, then removes the older ones. Every rank calls it."""
        final = self._folder / f"step-{num_steps_done:06d}"
        aside = self._folder / f"writing-{num_steps_done:06d}"
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        dcp_saver.save(_state(student), checkpoint_id=aside)
        torch.save(_rng_state(), aside / f"rng-{dist.get_rank()}.pt")
        dist.barrier()
        if first:
            progress = {"num_steps_done": num_steps_done}
            (aside / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")
            older = [p for p in self._folder.glob("step-*") if p != final]
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for path in older:
                shutil.rmtree(path)
        dist.barrier()
        return final

    def load(self, student: FSDP2Student) -> int:
        """Puts the newest checkpoint into the student; the number of finished steps.

        Raises:
            CheckpointError: there is none, or it is of another model.
        """
        path = self.newest()
        if path is None:
            raise CheckpointError(f"resume: no checkpoint in {self._folder}; start without --resume")
        state = _state(student)
        try:
            dcp_loader.load(state, checkpoint_id=path)
        except (CheckpointException, ValueError, RuntimeError) as error:
            raise CheckpointError(f"resume: {path} is not of this student: {error}") from None
        set_state_dict(
            student.module,
            student.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        rng = path / f"rng-{dist.get_rank()}.pt"
        if rng.is_file():
            _set_rng_state(torch.load(rng))
        progress = json.loads((path / _PROGRESS).read_text(encoding="utf-8"))
        return progress["num_steps_done"]


def _state(student: FSDP2Student) -> dict[str, Any]:
    model, optimizer = get_state_dict(student.module, student.optimizer)
    return {"model": model, "optimizer": optimizer}


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
