"""Reads rows from files, folders, the hub, or a function of the user's own."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdflow.errors import DataError

Row = dict[str, Any]


def load_rows(source: str) -> list[Row]:
    """All rows of `source`.

    Args:
        source: A `.jsonl` or `.parquet` file, a folder written by `datasets` (`save_to_disk`),
            `path/to/module.py:function` whose result is an iterable of rows, or a hub id
            (optionally `id:split`; `train` otherwise).

    Raises:
        DataError: a missing file or function, a line that is no JSON object, no rows at all.
    """
    path, _, name = source.partition(":")
    if path.endswith(".py"):
        rows = list(_from_function(Path(path), name))
    elif path.endswith(".jsonl"):
        rows = list(_from_jsonl(Path(source)))
    elif path.endswith(".parquet"):
        rows = _from_datasets(source, "parquet")
    elif path.endswith((".json", ".csv", ".txt")):
        raise DataError(f"data: {source}: expected .jsonl, .parquet, a folder, a hub id or x.py:f")
    else:
        rows = _from_datasets(source, "folder" if Path(source).is_dir() else "hub")
    if not rows:
        raise DataError(f"data: {source} holds no rows")
    return rows


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise DataError(f"data: no file {path}")
    return path


def _from_jsonl(path: Path) -> Iterator[Row]:
    with _existing(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"data: {path}:{number}: not JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"data: {path}:{number}: expected an object, got {line.strip()[:60]}")
            yield row


def _from_function(path: Path, name: str) -> Iterator[Row]:
    spec = importlib.util.spec_from_file_location(path.stem, _existing(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not name or not callable(vars(module).get(name)):
        functions = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise DataError(f"data: {path}: no function {name!r} (it has: {', '.join(functions)})")
    yield from vars(module)[name]()


def _from_datasets(source: str, kind: str) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"data: {source} needs the package datasets: pip install datasets") from None
    if kind == "parquet":
        data = datasets.Dataset.from_parquet(str(_existing(Path(source))))
    elif kind == "folder":
        data = datasets.load_from_disk(source)
        if isinstance(data, datasets.DatasetDict):
            raise DataError(f"data: {source} holds splits {sorted(data)}: give one of their folders")
    else:
        repo, _, split = source.partition(":")
        try:
            data = datasets.load_dataset(repo, split=split or "train")
        except (OSError, ValueError) as error:
            raise DataError(f"data: {source} is no file, no folder and no hub id: {error}") from None
    return [dict(row) for row in data]
