from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from kdflow.data.sources import Row, open_source
from kdflow.errors import DataError

ROWS = [{"messages": [{"role": "user", "content": "ü"}]}, {"messages": []}]
EXAMPLES = Path(__file__).parents[2] / "examples"


def read(source: str) -> list[Row]:
    return list(open_source(source).rows())


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps(r) for r in ROWS) + "\n", encoding="utf-8")
    assert read(str(path)) == ROWS


def test_compressed_lines_and_arrays(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(r) for r in ROWS)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.json").write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "c.json").write_text(lines, encoding="utf-8")
    (tmp_path / "d.json").write_text("\n " + json.dumps(ROWS, indent=1), encoding="utf-8")
    (tmp_path / "README.md").touch()
    for name in ("a.jsonl.gz", "b.json", "c.json", "d.json"):
        assert read(f"{tmp_path}/{name}") == ROWS
    assert read(str(tmp_path)) == 4 * ROWS


def test_byte_order_marks(tmp_path: Path) -> None:
    """As programs of Windows write them."""
    lines, array = "\r\n".join(json.dumps(r) for r in ROWS), json.dumps(ROWS)
    (tmp_path / "a.jsonl").write_bytes(lines.encode("utf-8-sig"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode("utf-8-sig")))
    (tmp_path / "c.json").write_bytes(array.encode("utf-8-sig"))
    (tmp_path / "d.json").write_bytes(lines.encode("utf-8-sig"))
    assert read(str(tmp_path)) == 4 * ROWS


def test_rows_are_read_one_after_another(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{bad\n", encoding="utf-8")
    rows = open_source(str(path)).rows()
    assert next(rows) == ROWS[0]
    with pytest.raises(DataError, match=":2: not JSON"):
        next(rows)


def test_python_function() -> None:
    rows = read(f"{EXAMPLES}/pydoc_topics.py:conversations")
    assert len(rows) > 300
    questions = [row["messages"][0]["content"] for row in rows]
    assert len(set(questions)) == len(questions)
    assert all(row["messages"][1]["content"].strip() for row in rows)


def test_module_that_is_looked_up_while_it_loads(tmp_path: Path) -> None:
    """As dataclasses do, to find out what an annotation means."""
    path = tmp_path / "rows.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import asdict, dataclass\n"
        "@dataclass\nclass Row:\n    messages: list\n"
        "def rows():\n    yield asdict(Row([]))\n"
    )
    assert read(f"{path}:rows") == [{"messages": []}]
    assert "rows" not in sys.modules, "it takes no name that others may have"


def test_rows_of_a_function_that_json_cannot_hold(tmp_path: Path) -> None:
    path = tmp_path / "rows.py"
    path.write_text("def rows():\n    yield {1: 2, 'messages': []}\n")
    with pytest.raises(DataError, match="rows: expected rows as JSON can hold them, got one with: '<' not supported"):
        open_source(f"{path}:rows").fingerprint()


def test_parquet_and_folder(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_list([{"messages": [{"role": "user", "content": "a"}]}] * 3)
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(tmp_path / "folder")
    assert read(f"{tmp_path}/a.parquet") == read(f"{tmp_path}/folder") == data.to_list()


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.jsonl", None, "no file"),
        ("a.jsonl", '{"a": 1}\n{bad\n', ":2: not JSON"),
        ("a.jsonl", "[1]\n", ":1: expected an object"),
        ("a.txt", "x", "expected .jsonl"),
        ("a.json", "[{]", "not JSON"),
        ("a.json", json.dumps({"train": ROWS}, indent=1), ":1: not JSON.* expected a row on each line, or in a .json"),
        ("a.jsonl", f"{'[' * 99999}\n", ":1: not JSON: maximum recursion depth"),
        ("a.jsonl", f"{'1' * 9999}\n", ":1: not JSON: Exceeds the limit"),
        ("a.JSONL", "{}", "a.JSONL: expected .jsonl, .jsonl.gz, .json, .parquet, a folder"),
        ("a.json", "[1]", "row 1: expected an object"),
        ("a.jsonl.gz", "x", "not a whole gzip file"),
        ("a.parquet", "x", "not a whole Parquet file"),
        ("a.jsonl", "\udcff", "not UTF-8"),
        ("a.py:rows", "def other():\n    return []\n", r"no function 'rows' \(it has: other\)"),
        ("a.py:rows", "def rows():\n    [{}]\n", "expected an iterable of rows, got None; does it return them"),
        ("b.py:rows", None, "no file"),
    ],
)
def test_bad_sources(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name.partition(":")[0]).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        read(f"{tmp_path}/{name}")
