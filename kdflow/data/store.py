"""Tokenised samples on disk, mapped into memory: any of them is read at once, and none is kept.

A store is a folder of flat arrays that is written once and then only read, by all ranks of a node and by later runs:

    input_ids.bin, loss_mask.bin                     int32 and bool, the samples one after another
    teacher_input_ids.bin, teacher_loss_mask.bin     the same of what the teacher alone reads; most often empty
    index.bin                                        (num_samples, 6) int64: ends of both sides, row, loss tokens,
                                                     number of the teacher that the row names, whether it was truncated
    report.json                                      also the names of these teachers
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from kdflow.data.report import DatasetReport
from kdflow.errors import DataError
from kdflow.types import Sample

FORMAT = 4  # of the files, and of what rows are made into
_FIELDS = 6
_SIDES = ("", "teacher_")
_DRAFT = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{32}")  # the key that it will have, and a name of its own
T = TypeVar("T")


class SampleView(Sequence[Sample]):
    """A sequence that is told one sample at a time."""

    def get(self, index: int) -> Sample:
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.get(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.get(index % len(self))


class StoreWriter:
    """Writes a store sample by sample, without holding any."""

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._digest = hashlib.blake2b(digest_size=16)
        self._ends = [0, 0]
        self._teachers: dict[str, int] = {}
        names = [f"{side}{array}.bin" for side in _SIDES for array in ("input_ids", "loss_mask")]
        *self._files, self._index = (
            self._stack.enter_context((folder / name).open("wb")) for name in (*names, "index.bin")
        )

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, sample: Sample, truncated: bool) -> None:
        for side, part in enumerate((sample, sample.teacher)):
            if part is not None:
                self._put(2 * side, part.input_ids.astype(np.int32))
                self._put(2 * side + 1, part.loss_mask.astype(bool))
                self._ends[side] += len(part)
        teacher = self._teachers.setdefault(sample.teacher_name, len(self._teachers))
        numbers = [*self._ends, sample.sample_id, sample.num_loss_tokens, teacher, truncated]
        entry = np.array(numbers, np.int64).tobytes()
        self._digest.update(entry + sample.teacher_name.encode())
        self._index.write(entry)

    def _put(self, number: int, values: np.ndarray) -> None:
        self._digest.update(values.tobytes())
        self._files[number].write(values.tobytes())

    def digest(self) -> str:
        """Of all that was written."""
        return self._digest.hexdigest()

    def teachers(self) -> list[str]:
        """Their names, in the order of their numbers."""
        return list(self._teachers)


class TokenStore(SampleView):
    """The samples of a folder that a StoreWriter filled.

    Raises:
        DataError: files are cut short, or there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"data: the token store {folder} is gone; start again, and leave it while a run reads it")
        self.folder = folder
        try:
            values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
            self.digest: str = values.pop("digest")
            self._teachers: list[str] = values.pop("teachers")
            self.report = DatasetReport(**values)
            self._index = _mapped(folder / "index.bin", np.int64, _FIELDS * self.report.num_samples).reshape(
                -1, _FIELDS
            )
            self._sides = [
                (
                    _mapped(folder / f"{side}input_ids.bin", np.int32, end),
                    _mapped(folder / f"{side}loss_mask.bin", np.bool_, end),
                )
                for side, end in zip(_SIDES, self._index[-1, :2].tolist(), strict=True)
            ]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"data: the token store {folder} is damaged ({error}): delete it") from None

    def __len__(self) -> int:
        return len(self._index)

    def rows(self) -> np.ndarray:
        """(num_samples,) the row of each sample."""
        return self._index[:, 2]

    def first_rows_by_teacher(self) -> dict[str, int]:
        """For each teacher that rows name, the first row of it; the empty name is of rows that name none."""
        _, first = np.unique(self._index[:, 4], return_index=True)
        return {name: int(self._index[at, 2]) for name, at in zip(self._teachers, first, strict=True)}

    def report_of(self, indices: np.ndarray, skipped: dict[str, int]) -> DatasetReport:
        """What became of the rows of some samples, and of those that were skipped."""
        rows, truncated = self._index[indices, 2], self._index[indices, 5] > 0
        return DatasetReport(
            num_rows=len(np.unique(rows)) + sum(skipped.values()),
            num_samples=len(indices),
            num_tokens=int(np.diff(self._index[:, 0], prepend=0)[indices].sum()),
            num_loss_tokens=int(self._index[indices, 3].sum()),
            num_truncated=len(np.unique(rows[truncated])),
            skipped=skipped,
        )

    def get(self, index: int) -> Sample:
        *ends, row, _, teacher_number, _ = self._index[index].tolist()
        name = self._teachers[teacher_number]
        begins = self._index[index - 1].tolist()[:2] if index else (0, 0)
        student, teacher = (
            Sample(ids[begin:end], mask[begin:end], row, teacher_name=name) if end > begin else None
            for (ids, mask), begin, end in zip(self._sides, begins, ends, strict=True)
        )
        assert student is not None
        return replace(student, teacher=teacher)


def _mapped(path: Path, dtype: type[np.generic], count: int) -> np.ndarray:
    expected, size = count * np.dtype(dtype).itemsize, path.stat().st_size
    if size != expected:
        raise ValueError(f"{path.name} has {size} bytes instead of {expected}")
    if count == 0:  # nothing cannot be mapped
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, mode="r").view(np.ndarray)


def open_or_write(cache: Path, key: str, write: Callable[[StoreWriter], DatasetReport]) -> TokenStore:
    """The store of this key, written first if it is not there.

    It appears under its name when it is whole; of two processes that write it at the same time the second finds that
    of the first.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = cache / key
    if not folder.exists():
        with _draft(cache, key) as draft:
            try:
                with StoreWriter(draft) as writer:
                    report = write(writer)
                values = {**asdict(report), "digest": writer.digest(), "teachers": writer.teachers()}
                (draft / "report.json").write_text(json.dumps(values), encoding="utf-8")
                os.rename(draft, folder)
            except OSError as error:
                if not folder.exists():
                    raise DataError(f"data.cache_dir: writing {folder} failed: {error}") from None
    return TokenStore(folder)


@contextmanager
def _draft(cache: Path, key: str) -> Iterator[Path]:
    """A folder to be filled and renamed; at the end nothing of it is left.

    It is locked before it is there. The kernel unlocks it when its process is killed, so whoever finds one without a
    lock may remove it, and does before it writes.
    """
    draft = cache / f"{key}.{uuid.uuid4().hex}"
    with ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            _remove_drafts_of_the_dead(cache)
            lock = stack.enter_context(_lock_of(draft).open("w"))
            stack.callback(_remove, draft)
            with suppress(OSError):  # a filesystem without locks: nobody else removes a draft there
                fcntl.flock(lock, fcntl.LOCK_EX)
            draft.mkdir()
        except OSError as error:
            raise DataError(f"data.cache_dir: {cache} cannot be written: {error}; choose another folder") from None
        yield draft


def _remove_drafts_of_the_dead(cache: Path) -> None:
    for draft in [path for path in cache.iterdir() if _DRAFT.fullmatch(path.name)]:
        with suppress(OSError), _lock_of(draft).open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(draft)


def _lock_of(draft: Path) -> Path:
    return draft.with_name(f"{draft.name}.lock")


def _remove(draft: Path) -> None:
    """The lock last: while there is a draft, there is its lock."""
    shutil.rmtree(draft, ignore_errors=True)
    _lock_of(draft).unlink(missing_ok=True)
