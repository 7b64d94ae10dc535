"""Folders that are written whole, or not at all under their name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from kdflow.errors import CheckpointError


def check_free(folder: Path) -> None:
    """
    Raises:
        CheckpointError: the folder of an `--output` holds something, or is none.
    """
    try:
        final = folder.resolve()
        found = "is not empty" if final.exists() and any(final.iterdir()) else None
    except OSError as error:  # a file, or one that may not be read
        found = f"cannot be used ({error.strerror})"
    if found is not None:
        raise CheckpointError(f"{folder} {found}: choose another --output, or remove it")


@contextmanager
def written_aside(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to write into. When that is done it is flushed to the disk, and takes the name of `folder`.

    Args:
        replace: what `folder` holds.

    Raises:
        CheckpointError: it could not be written. Nothing of it is left, and `folder` is as it was.
    """
    final = folder.resolve()
    aside = final.with_name(f"writing-{final.name}")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    try:
        aside.mkdir(parents=True)
        yield aside
        for path in (*aside.rglob("*"), aside):
            if path.is_file():  # safetensors writes files that nobody else may read
                path.chmod(path.parent.stat().st_mode & 0o666)
            flush(path)
        if replace and final.exists():
            _replace(final, aside)
        else:
            aside.rename(final)
        flush(final.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} was not written ({error})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _replace(folder: Path, aside: Path) -> None:
    leaving = folder.with_name(f"removing-{folder.name}")
    shutil.rmtree(leaving, ignore_errors=True)
    folder.rename(leaving)
    try:
        aside.rename(folder)
    except OSError:
        leaving.rename(folder)
        raise
    shutil.rmtree(leaving, ignore_errors=True)


def flush(path: Path) -> None:
    """What a file holds, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
