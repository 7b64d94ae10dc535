"""Reads rows from files, folders, the hub, or a function of the user's own, one after another."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from kdflow.errors import DataError

Row = dict[str, Any]
_FILES = (".jsonl", ".jsonl.gz", ".json", ".parquet")


@dataclass(frozen=True)
class Source:
    """Rows that are read lazily, and how to tell whether they are still the same.

    Attributes:
        name: as the user gave it.
        files: what the rows are read from; empty for a function, whose rows may come from anywhere.
        rows: reads them, from the first one on.
    """

    name: str
    files: tuple[Path, ...]
    rows: Callable[[], Iterator[Row]]

    def fingerprint(self) -> str:
        """Changes with the rows: of files their paths, sizes and times, of a function the rows themselves."""
        digest = hashlib.sha256()
        for path in self.files:
            status = path.stat()
            digest.update(f"{path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        if not self.files:
            for row in self.rows():
                digest.update(self._as_bytes(row))
        return digest.hexdigest()

    def rows_of(self, fingerprint: str) -> Iterator[Row]:
        """The rows, read once more.

        Raises:
            DataError: after the last one, where a function gave others than those of this fingerprint.
        """
        if self.files:
            yield from self.rows()
            return
        digest = hashlib.sha256()
        for row in self.rows():
            digest.update(self._as_bytes(row))
            yield row
        if digest.hexdigest() != fingerprint:
            raise DataError(
                f"data: {self.name}: called twice, it gave other rows the second time; expected the same rows in the "
                "same order each time: give its random numbers a seed, or write its rows to a file"
            )

    def _as_bytes(self, row: Row) -> bytes:
        try:
            return json.dumps(row, sort_keys=True, default=str).encode()
        except (TypeError, ValueError) as error:
            raise DataError(f"data: {self.name}: expected rows as JSON can hold them, got one with: {error}") from None


def open_source(source: str) -> Source:
    """
    Args:
        source: A `.jsonl`, `.jsonl.gz`, `.json` (lines, or one array, which is read whole) or `.parquet` file; a folder
            of these, read in the order of their names; a folder written by `datasets` (`save_to_disk`);
            `path/to/module.py:function` whose result is an iterable of rows; or a hub id (optionally `id:split`;
            `train` otherwise).

    Raises:
        DataError: a missing file or function; later, from `rows`, a line that is no JSON object.
    """
    path, _, name = source.partition(":")
    if path.endswith(".py"):
        _existing(Path(path))
        return Source(source, (), partial(_from_function, Path(path), name))
    if Path(source).is_file() or Path(source).suffix in (".csv", ".txt", ".gz", ".zst", ".tsv", *_FILES):
        return _of_files(source, [Path(source)])
    if Path(source).is_dir():
        files = sorted(item for item in Path(source).iterdir() if item.name.endswith(_FILES))
        if Path(source, "state.json").exists() or Path(source, "dataset_dict.json").exists() or not files:
            return _of_datasets(source, from_disk=True)
        return _of_files(source, files)
    return _of_datasets(source, from_disk=False)


def _of_files(source: str, files: Sequence[Path]) -> Source:
    for path in files:
        if not path.name.endswith(_FILES):
            raise DataError(f"data: {path}: expected {', '.join(_FILES)}, a folder, a hub id or x.py:f")
        _existing(path)

    def rows() -> Iterator[Row]:
        for path in files:
            yield from _from_parquet(path) if path.suffix == ".parquet" else _from_json(path)

    return Source(source, tuple(files), rows)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"data: no file {path}")
    return path


def _from_json(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as text:  # with a byte order mark or without
            if path.suffix == ".json" and _is_array(text):
                rows = _parsed(text.read(), str(path))
                yield from (_object(row, f"{path}: row {number}") for number, row in enumerate(rows, 1))
                return
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield _object(_parsed(line, f"{path}:{number}"), f"{path}:{number}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"data: {path}: not a whole gzip file: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"data: {path}: not UTF-8: {error}") from None
    except OSError as error:
        raise DataError(f"data: {path}: cannot be read: {error}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"data: {where}: not JSON: {error}; expected a row on each line, or in a .json file one array of rows"
        ) from None


def _is_array(text: TextIO) -> bool:
    """Whether the first thing in it opens an array; it is at its beginning again then."""
    first = next((line.lstrip()[0] for line in text if line.strip()), "")
    text.seek(0)
    return first == "["


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"data: {where}: expected an object, got {str(row)[:60]}")
    return row


def _from_parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"data: {path} needs the package pyarrow: pip install datasets") from None
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"data: {path}: not a whole Parquet file: {error}") from None


def _from_function(path: Path, name: str) -> Iterator[Row]:
    # Under its path, which no other module can have for a name.
    spec = importlib.util.spec_from_file_location(str(path.resolve()), path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not name or not callable(vars(module).get(name)):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise DataError(f"data: {path}: no function {name!r} (it has: {', '.join(functions)})")
    rows = vars(module)[name]()
    if not isinstance(rows, Iterable):
        raise DataError(f"data: {path}:{name}: expected an iterable of rows, got {rows!r}; does it return them?")
    for number, row in enumerate(rows, 1):
        yield _object(row, f"{path}:{name}: row {number}")


def _of_datasets(source: str, *, from_disk: bool) -> Source:
    """`datasets` maps its Arrow files into memory, so rows are read lazily from them too."""
    try:
        import datasets
    except ImportError:
        raise DataError(f"data: {source} needs the package datasets: pip install datasets") from None
    try:
        if from_disk:
            data = datasets.load_from_disk(source)
        else:
            repo, _, split = source.partition(":")
            data = datasets.load_dataset(repo, split=split or "train")
    except (OSError, ValueError) as error:
        kinds = (
            f"holds no {', '.join(_FILES)} and was not written by datasets" if from_disk else "is no file, no folder"
        )
        raise DataError(f"data: {source} {kinds}{'' if from_disk else ' and no hub id'}: {error}") from None
    if isinstance(data, datasets.DatasetDict):
        raise DataError(f"data: {source} holds splits {sorted(data)}: give one of their folders")
    files = tuple(Path(item["filename"]) for item in data.cache_files)
    return Source(source, files, lambda: (dict(row) for row in data))
