"""Which teacher a sample learns from: its row says it, or its source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdflow.config import DataConfig, DataSource
from kdflow.data import Dataset, load_datasets
from kdflow.errors import DataError
from support.tiny import make_tokenizer

KNOWN = ("math", "code")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("One Two First Second answer. Be brief." * 9)


def row(**columns: object) -> dict:
    messages = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "First answer."}]
    return {"messages": messages, **columns}


@pytest.fixture
def write(tmp_path: Path):
    def write(name: str, rows: list[dict]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return write


def names(data: Dataset | None) -> list[str]:
    assert data is not None
    return [sample.teacher_name for sample in data.samples]


def test_the_row_decides_before_the_source(tokenizer, write) -> None:
    mixed = write("mixed.jsonl", [row(expert="code"), row(), row(expert="math"), row(expert=None)])
    own_context = write("own.jsonl", [row(teacher_system="Be brief.")])
    sources: list[DataSource | str] = [DataSource(mixed, teacher="math"), DataSource(own_context, teacher="code")]
    config = DataConfig(sources, num_eval_samples=0, teacher_column="expert")
    for _ in range(2):  # the second time from the store
        data, _ = load_datasets(config, tokenizer, 0, KNOWN)
        assert names(data) == ["code", "math", "math", "math", "code"]
        assert data.samples[4].for_teacher().teacher_name == "code"
    other, _ = load_datasets(DataConfig(sources, num_eval_samples=0), tokenizer, 0, KNOWN)
    assert names(other) == ["math"] * 4 + ["code"]
    assert other.digests[mixed] != data.digests[mixed], "a run does not go on with other teachers"


def test_held_out_samples_keep_their_teacher(tokenizer, write) -> None:
    rows = [row(expert=name) for name in ("code", "math") * 3]
    config = DataConfig(write("train.jsonl", rows), num_eval_samples=3, teacher_column="expert")
    data, held_out = load_datasets(config, tokenizer, 1, KNOWN)
    for part in (data, held_out):
        assert part is not None
        assert names(part) == [("code", "math")[sample.sample_id % 2] for sample in part.samples]
    evaluated: list[DataSource | str] = [
        DataSource(write("a.jsonl", [row()] * 9), teacher="math"),
        DataSource(write("b.jsonl", [row()] * 9), weight=3, teacher="code"),
    ]
    config = DataConfig(write("train.jsonl", rows), evaluated, num_eval_samples=8, teacher_column="expert")
    assert names(load_datasets(config, tokenizer, 1, KNOWN)[1]) == ["math"] * 2 + ["code"] * 6


def test_an_only_teacher_need_not_be_named(tokenizer, write) -> None:
    config = DataConfig(write("a.jsonl", [row()]), num_eval_samples=0)
    assert names(load_datasets(config, tokenizer, 0)[0]) == [""]
    assert names(load_datasets(config, tokenizer, 0, ("math",))[0]) == ["math"]


@pytest.mark.parametrize(
    "rows, options, known, message",
    [
        (
            [row()],
            {"teacher": "mth"},
            KNOWN,
            "a.jsonl: unknown teacher 'mth'; did you mean \"math\"? (known: code, math)",
        ),
        (
            [row(), row(of="cod")],
            {"column": "of", "teacher": "math"},
            KNOWN,
            "row 2, column `of`: unknown teacher 'cod'",
        ),
        ([row(of="math"), row()], {"column": "of"}, KNOWN, "row 2 names no teacher, and there are code, math"),
        ([row()], {}, KNOWN, "row 1 names no teacher"),
        ([row()], {"teacher": "math"}, KNOWN, "teachers.code: no sample of data.train learns from it"),
        ([row()], {"teacher": "math"}, ("",), "the run's only one has no name"),
        ([row(of=3)], {"column": "of"}, ("",), "1 skipped: `of` is not text"),
    ],
)
def test_refused(tokenizer, write, rows: list[dict], options: dict, known: tuple, message: str) -> None:
    source = DataSource(write("a.jsonl", rows), teacher=options.get("teacher", ""))
    config = DataConfig([source], num_eval_samples=0, teacher_column=options.get("column"))
    with pytest.raises(DataError) as error:
        load_datasets(config, tokenizer, 0, known)
    assert message in str(error.value)
