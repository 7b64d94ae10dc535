"""Checkpoints of a run, written beside the training: staged in host memory, then by a thread of their own."""

from __future__ import annotations

import hashlib
import math
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict_loader as dcp_loader
import torch.distributed.checkpoint.state_dict_saver as dcp_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from kdflow.errors import CheckpointError
from kdflow.student.checkpoint_folder import (
    DISK_TIMEOUT,
    CheckpointFolder,
    CheckpointInfo,
    Fingerprint,
    check_fingerprint,
)
from kdflow.student.fsdp2 import FSDP2Student
from kdflow.student.lora import has_lora, lora_scaling
from kdflow.student.random_state import random_state, seed_random_state, set_random_state

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


class CheckpointStore:
    """Saves and restores a student: weights, optimizer, random state of every rank, and what CheckpointInfo says.

    Every rank makes one and calls its methods at the same steps. `save` returns once the state is copied to host
    memory; a thread writes it, and speaks with the other ranks' threads over a gloo group of its own. One checkpoint
    is written at a time: a save waits for the one before. A save that fails (a full disk) leaves the earlier
    checkpoints as they are, and training goes on: `poll` tells of it, and `wait` makes it an error.

    Args:
        folder: of the checkpoints.
        student: whose state it is.
        data: fingerprint of the training data and the teachers; that of the student is added to it.
        keep_last: newest checkpoints that are kept.
        keep_best: whether the one of lowest score is kept, too.
        seed: of the random state of ranks that a checkpoint does not know.
    """

    def __init__(
        self,
        folder: Path,
        student: FSDP2Student,
        *,
        data: Fingerprint | None = None,
        keep_last: int = 1,
        keep_best: bool = False,
        seed: int = 0,
    ) -> None:
        self._folder = CheckpointFolder(folder)
        self._student = student
        self._fingerprint: Fingerprint = {**_fingerprint(student.model), **(data or {})}
        self._keep_last = keep_last
        self._keep_best = keep_best
        self._seed = seed
        self._rank = dist.get_rank()
        self._num_ranks = dist.get_world_size()
        group = dist.new_group(backend="gloo", timeout=DISK_TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._stager: DefaultStager | None = None
        self._newest_step: int | None = None  # of those saved or loaded here
        self._pending: tuple[CheckpointInfo, Future[str | None]] | None = None
        self._failure: str | None = None
        self._warning: str | None = None
        if self._rank == 0:
            self._folder.clear_remains()
        best = self._folder.best()
        self._best_score = math.inf if best is None or best.info.score is None else best.info.score

    def save(self, num_steps_done: int, *, num_skipped: int = 0, score: float | None = None) -> None:
        """Takes the state as it is now, but for one that is there; it is on disk some time after."""
        self._settle()
        if num_steps_done == self._newest_step:
            return
        if score is not None and not math.isfinite(score):
            score = None
        info = CheckpointInfo(num_steps_done, self._num_ranks, num_skipped, score, self._fingerprint)
        state = {**_state(self._student), "rng": {str(self._rank): random_state()}}
        self._pending = info, self._thread.submit(self._write, self._stage(state), info)

    def is_best(self, score: float) -> bool:
        """Whether no checkpoint has as low a score, and the best one is to be kept."""
        self._settle()
        return self._keep_best and score < self._best_score

    def poll(self) -> str | None:
        """What became of a save that failed since the last call; waits for nothing."""
        if self._pending is not None and self._pending[1].done():
            self._settle()
        warning, self._warning = self._warning, None
        return warning

    def wait(self) -> None:
        """Until the last save is on disk.

        Raises:
            CheckpointError: it is not.
        """
        self._settle()
        if self._failure is not None:
            raise CheckpointError(f"{self._failure}; make room and go on with --resume=true")

    def close(self) -> None:
        """Lets a save that is under way come to its end."""
        self._thread.shutdown(wait=True)
        if self._stager is not None:
            self._stager.close()

    def load(self) -> CheckpointInfo | None:
        """Puts the newest checkpoint into the student; None where there is none yet.

        Of the optimizer it takes the moments and the steps; the options are those of this run.
        The number of ranks may be another one. Then a rank that the checkpoint knows takes its random state from it,
        and one that it does not know gets one from the seed, the step and its number.

        Raises:
            CheckpointError: it is of another student, other data or teachers, or cannot be read.
        """
        checkpoint = self._folder.newest()
        if checkpoint is None:
            return None
        check_fingerprint(checkpoint, self._fingerprint)
        state = _state(self._student)
        options = state["optimizer"].pop("param_groups")
        try:
            dcp_loader.load(state, checkpoint_id=checkpoint.path)
            rng = _load_rng(checkpoint.path, self._rank)
        except (CheckpointException, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"resume: {checkpoint.path} cannot be read ({_reason(error)}); move it away to go on from the one "
                "before"
            ) from None
        set_state_dict(
            self._student.module,
            self._student.optimizer,
            model_state_dict=state["model"],
            optim_state_dict={**state["optimizer"], "param_groups": options},
        )
        if rng is None:
            seed_random_state(self._seed, checkpoint.info.num_steps_done, self._rank)
        else:
            set_random_state(rng)
        self._newest_step = checkpoint.info.num_steps_done
        return checkpoint.info

    def _stage(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy in host memory. On GPUs it is pinned and its pages are used again for the next one."""
        if torch.cuda.is_available():
            if self._stager is None:
                self._stager = DefaultStager(_staging(pinned=True))
            return self._stager.stage(state)  # pyright: ignore[reportReturnType]
        stager = DefaultStager(_staging(pinned=False))
        staged = stager.stage(state)
        stager.close()
        return staged  # pyright: ignore[reportReturnType]

    def _write(self, state: dict[str, Any], info: CheckpointInfo) -> str | None:
        """In the thread: writes, renames, removes old ones; why it failed, alike on every rank."""
        aside = self._folder.aside(info.num_steps_done)
        failure = None
        try:
            dcp_saver.save(state, storage_writer=_Writer(aside), process_group=self._group)
        except (CheckpointException, OSError, RuntimeError) as error:
            failure = _reason(error)
        if self._rank == 0:
            try:
                if failure is None:
                    self._folder.publish(aside, info)
                    self._folder.prune(keep_last=self._keep_last, keep_best=self._keep_best)
            except (OSError, CheckpointError) as error:
                failure = _reason(error)
            if failure is not None:
                shutil.rmtree(aside, ignore_errors=True)
        outcome = [failure]
        try:
            dist.broadcast_object_list(outcome, src=0, group=self._group)
        except RuntimeError as error:
            return f"another rank is gone: {_reason(error)}"
        return outcome[0]

    def _settle(self) -> None:
        """Waits for the save under way. Called at the same step on every rank where its outcome decides anything."""
        if self._pending is None:
            return
        (info, future), self._pending = self._pending, None
        failure = future.result()
        if failure is None:
            self._failure = None
            self._newest_step = info.num_steps_done
            if info.score is not None and info.score < self._best_score:
                self._best_score = info.score
            return
        newest = self._folder.newest()
        kept = "there is no earlier one" if newest is None else f"{newest.path.name} is kept"
        self._failure = f"checkpoint of step {info.num_steps_done} was not written ({failure}); {kept}"
        self._warning = self._failure


class _Writer(FileSystemWriter):
    """Says why a file could not be written: torch's own ends it all the same, and tells of that failure alone."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def _staging(*, pinned: bool) -> StagingOptions:
    return StagingOptions(
        use_pinned_memory=pinned, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=pinned
    )


def _state(student: FSDP2Student) -> dict[str, Any]:
    model, optimizer = get_state_dict(student.module, student.optimizer)
    return {"model": model, "optimizer": optimizer}


def _load_rng(path: Path, rank: int) -> bytes | None:
    """The random state of one rank, None where the checkpoint has none of it."""
    name = str(rank)
    if f"rng.{name}" not in FileSystemReader(path).read_metadata().state_dict_metadata:
        return None
    state = {"rng": {name: b""}}
    with warnings.catch_warnings():  # each rank reads its own: nothing to agree on
        warnings.simplefilter("ignore")
        dcp_loader.load(state, checkpoint_id=path, no_dist=True)
    return state["rng"][name]


def _fingerprint(model: Any) -> dict[str, str | float]:
    """Family and size of a model, a digest of the names and shapes of its parameters, and how often adapters count."""
    digest = hashlib.sha256()
    num_values = 0
    for name, parameter in model.named_parameters():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        num_values += parameter.numel()
    return {
        "student.model_type": model.config.model_type,
        "student.num_parameters": num_values,
        "student.parameters": digest.hexdigest()[:16],
        **({"student.lora: alpha / rank": lora_scaling(model)} if has_lora(model) else {}),
    }


def _reason(error: BaseException) -> str:
    """The first line of what went wrong, and on which rank."""
    if isinstance(error, CheckpointException):
        rank, (error, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {_reason(error)}"
    return str(error).split("\n", 1)[0] or type(error).__name__
