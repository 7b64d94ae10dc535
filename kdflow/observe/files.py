"""Files of a run that training can do without: a disk that is full costs what could not be written, not the run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Outages:
    """Lets failures to write a file pass, and tells `say` of the first."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path = path
        self._say = say
        self._told = False

    @contextmanager
    def passed(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._told:
                return
            self._told = True
            why = error.strerror or error
            with suppress(OSError):  # what is said may go to a file on the same disk
                self._say(f"{self._path} cannot be written ({why}); training goes on without it, and tries again")


class AppendedFile:
    """A file that grows by records: a record is there as a whole, or, where it could not be written, not at all.

    Args:
        say: told once of records that are lost.
        header: goes before the first record.
    """

    def __init__(self, path: Path, say: Callable[[str], None], *, header: bytes = b"") -> None:
        self._file = path.open("ab", buffering=0)
        self._outages = Outages(path, say)
        self._header = header

    def append(self, record: bytes) -> None:
        with self._outages.passed():
            self._write(self._header + record)
            self._header = b""

    def close(self) -> None:
        with self._outages.passed():
            self._file.close()

    def _write(self, data: bytes) -> None:
        end = self._file.seek(0, os.SEEK_END)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            with suppress(OSError):
                self._file.truncate(end)
            raise
