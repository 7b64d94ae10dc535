"""From rows to samples on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdflow.config import DataConfig, DataSource
from kdflow.data import ChatTokenizer, load_datasets, progress
from kdflow.data.dataset import tokenize_rows
from kdflow.data.report import DatasetReport
from kdflow.data.store import StoreWriter, open_or_write
from kdflow.errors import DataError
from kdflow.types import Sample
from support.ring import Child, hang
from support.tiny import make_tokenizer

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second answer."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("One Two First Second answer. Be brief." * 9)


def tokenize(rows: list[dict], tokenizer, **options) -> tuple[list[Sample], DatasetReport]:
    kept: list[Sample] = []
    config = DataConfig(train="x", **options)
    report = tokenize_rows(rows, ChatTokenizer(tokenizer), config, "x", lambda sample, truncated: kept.append(sample))
    return kept, report


def said(sample: Sample, tokenizer) -> str:
    return tokenizer.decode(sample.input_ids[sample.loss_mask])


def long_row(question: Any = "why " * 40, answer: str = "because", **columns) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **columns}


def test_long_prompt_is_cut_from_the_left(tokenizer) -> None:
    (sample,), report = tokenize([long_row()], tokenizer, max_length=40)
    assert len(sample) == 40
    assert said(sample, tokenizer) == "because<|im_end|>"
    assert report.num_truncated == 1


def test_long_answer_keeps_its_beginning(tokenizer) -> None:
    answer = "because of this " * 20
    (sample,), _ = tokenize([long_row("why?", answer)], tokenizer, max_length=30)
    assert len(sample) == 30
    assert answer.startswith(said(sample, tokenizer))
    assert sample.num_loss_tokens == 29


def test_long_samples_skipped_and_counted(tokenizer) -> None:
    rows = [long_row(), long_row("short?"), {"messages": []}, {"text": "no chat"}, {"messages": TURNS[:2]}]
    _, report = tokenize(rows, tokenizer, max_length=40, long_samples="skip")
    assert (report.num_rows, report.num_samples) == (5, 1)
    assert report.skipped == {
        "longer than max_length 40": 1,
        "no `messages` list": 2,
        "no assistant turn (it has system, user)": 1,
    }
    assert "1 skipped: no assistant turn" in str(report)


@pytest.mark.parametrize("max_length", [2, 7, 40, 64])
def test_split_predicts_each_token_once(tokenizer, max_length: int) -> None:
    row = long_row(answer="because of this " * 20)
    (whole,), _ = tokenize([row], tokenizer, max_length=999)
    pieces, report = tokenize([row], tokenizer, max_length=max_length, long_samples="split")
    assert all(len(piece) <= max_length for piece in pieces)
    assert np.array_equal(np.concatenate([p.input_ids[p.loss_mask] for p in pieces]), whole.input_ids[whole.loss_mask])
    assert report.num_loss_tokens == sum(p.num_loss_tokens for p in pieces) == whole.num_loss_tokens
    assert {p.sample_id for p in pieces} == {0}


def test_no_usable_row(tokenizer) -> None:
    with pytest.raises(DataError, match=r"x: no row can be used .*2 skipped: no assistant turn \(it has system\)"):
        tokenize([{"messages": TURNS[:1]}] * 2, tokenizer)
    with pytest.raises(DataError, match="x holds no rows"):
        tokenize([], tokenizer)
    rows: list[dict] = [{"train": [], "test": []}, {"messages": []}]
    with pytest.raises(
        DataError, match=r"expected a column `messages`, and the columns of the first row are test, train"
    ):
        tokenize(rows, tokenizer)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [{"content": "a"}]}, "one of `messages` without `role`"),
        ({"messages": [{"role": 3, "content": "a"}]}, "one of `messages` without `role`"),
        ({"messages": [{"role": "user", "content": None}]}, "neither `content` nor `tool_calls`"),
        ({"messages": [{"role": "user", "tool_calls": "clock()"}]}, "`tool_calls` of one of `messages` is not a list"),
        (long_row(5), "`content` of one of `messages` is not text"),
        (long_row({"a": 1}), "`content` of one of `messages` is not text"),
        (long_row([{"type": "text", "text": "a"}, {"type": "image"}]), "`content` of one of `messages` is not text"),
        (long_row([{"type": "text"}]), "`content` of one of `messages` is not text"),
        (long_row("\ud83d"), "a lone surrogate"),
        (long_row("a", teacher_messages=[{"role": "user", "content": 5}]), "`content` of one of `teacher_messages`"),
        (long_row("a", tools=["clock"]), "the chat template refuses the messages"),
        (long_row("a", teacher_system=3), "`teacher_system` is not text"),
        (long_row("a", teacher_messages=[]), "no `teacher_messages` list"),
        (long_row("a", tools="clock"), "`tools` is not a list"),
        (long_row("a", teacher_messages=long_row(answer="since")["messages"]), "same tokens of the loss"),
    ],
)
def test_rows_that_cannot_be_used(tokenizer, row: dict, reason: str) -> None:
    _, report = tokenize([long_row("short?"), row], tokenizer, max_length=999)
    ((found, count),) = report.skipped.items()
    assert reason in found
    assert count == 1


def test_calls_and_tools_that_are_left_out_are_counted(tokenizer) -> None:
    """By a template that writes contents alone, as that of SmolLM2 does."""
    call = {"function": {"name": "clock", "arguments": {}}}
    calling = {"messages": [*TURNS[:2], {"role": "assistant", "tool_calls": [call]}]}
    tools = [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}]
    rows = [long_row("a"), calling, {**calling, "tools": tools}, {"messages": TURNS, "tools": tools}]
    (sample,), report = tokenize(rows, tokenizer)
    assert sample.sample_id == 0
    assert {reason.partition(":")[0]: count for reason, count in report.skipped.items()} == {
        "the chat template leaves out the tool calls": 2,
        "the chat template leaves out `tools`": 1,
    }


def test_text_in_parts(tokenizer) -> None:
    parts = [{"type": "text", "text": "wh", "image": None}, {"type": "text", "text": "y?"}]
    (sample, other), _ = tokenize([long_row(parts), long_row("why?")], tokenizer)
    assert same(sample, other)


def test_context_of_the_teacher_alone(tokenizer) -> None:
    rows = [
        {"messages": TURNS},
        {"messages": TURNS[1:], "teacher_system": "Be wise."},
        {"messages": TURNS, "teacher_messages": [{"role": "user", "content": "Hint."}, *TURNS[1:]]},
        {"messages": TURNS, "teacher_system": ""},
    ]
    samples, _ = tokenize(rows, tokenizer, teacher_context="Think.")
    student = tokenizer.apply_chat_template(TURNS, tokenize=False)
    heads = ["system\nThink.\n\nBe brief.<", "system\nBe wise.<", "user\nHint.<", None]
    for sample, head in zip(samples, heads, strict=True):
        text = tokenizer.decode(sample.for_teacher().input_ids)
        assert (sample.teacher is None) == (head is None)
        assert text.startswith(f"<|im_start|>{head}") if head else text == student
        assert said(sample.for_teacher(), tokenizer) == said(sample, tokenizer)
    assert tokenizer.decode(samples[0].input_ids) == student


@pytest.mark.parametrize("max_length", [24, 40, 60])
def test_both_sides_shortened_keep_the_same_loss(tokenizer, max_length: int) -> None:
    row = long_row("why?" * 9, "because of this " * 2, teacher_system="Be wise. " * 9)
    (sample,), report = tokenize([row], tokenizer, max_length=max_length)
    assert report.num_truncated == 1
    assert sample.longest == max_length
    assert sample.num_loss_tokens > 10
    assert said(sample.for_teacher(), tokenizer) == said(sample, tokenizer)
    _, report = tokenize([row, long_row("a")], tokenizer, max_length=max_length, long_samples="split")
    assert list(report.skipped) == ["longer than max_length, and what the teacher alone reads cannot be split"]


def write(path: Path, questions: list[str], **columns) -> str:
    path.write_text("".join(json.dumps(long_row(q, **columns)) + "\n" for q in questions), encoding="utf-8")
    return str(path)


def same(a: Sample, b: Sample) -> bool:
    return (
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.loss_mask, b.loss_mask)
        and (a.teacher is None) == (b.teacher is None)
        and (a.teacher is None or b.teacher is None or same(a.teacher, b.teacher))
    )


def test_samples_come_back_from_the_store(tokenizer, tmp_path: Path) -> None:
    rows = [long_row("short?"), long_row("b", teacher_system="Be wise."), {"messages": []}, long_row("c" * 9)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected, report = tokenize(rows, tokenizer)
    config = DataConfig(str(path), num_eval_samples=0, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):  # written, then found
        data, held_out = load_datasets(config, tokenizer, 0)
        assert held_out is None
        assert data.report == report
        assert [s.sample_id for s in data.samples] == [0, 1, 3]
        assert all(same(a, b) for a, b in zip(data.samples, expected, strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_store_is_made_again_when_what_decides_it_changes(tokenizer, tmp_path: Path) -> None:
    name, cache = write(tmp_path / "a.jsonl", ["a", "b"]), tmp_path / "cache"

    def digest(tokenizer=tokenizer, **options) -> str:
        config = DataConfig(name, num_eval_samples=0, cache_dir=str(cache), **options)
        return load_datasets(config, tokenizer, 0)[0].digests[name]

    first = digest()
    others = [
        digest(max_length=20),
        digest(loss_roles=["user"]),
        digest(teacher_context="Hm."),
        digest(make_tokenizer("z")),
    ]
    assert len({first, *others}) == 5
    write(tmp_path / "a.jsonl", ["a", "c"])
    assert digest() not in (first, *others)
    write(tmp_path / "a.jsonl", ["a", "b"])
    assert digest() == first, "the same rows again, whenever they were written"
    assert not list(cache.glob("*.*")), "drafts are gone"


def test_rows_of_a_function_are_looked_at_each_time(tokenizer, tmp_path: Path) -> None:
    module, text = tmp_path / "rows.py", tmp_path / "rows.txt"
    module.write_text(
        f"def rows():\n    for line in open({str(text)!r}):\n"
        "        yield {'messages': [{'role': 'user', 'content': line}, {'role': 'assistant', 'content': 'So.'}]}\n"
    )
    config = DataConfig(f"{module}:rows", num_eval_samples=0, cache_dir=str(tmp_path / "cache"))
    found = []
    for lines in ("a\n", "a\nb\n", "a\n"):
        text.write_text(lines)
        found.append(load_datasets(config, tokenizer, 0)[0])
    assert [len(data.samples) for data in found] == [1, 2, 1]
    assert found[0].digests == found[2].digests


ROWS = """
def rows():
    for text in {texts}:
        yield {{"messages": [{{"role": "user", "content": text}}, {{"role": "assistant", "content": "So."}}]}}
"""


@pytest.mark.parametrize("own_source", [False, True])
def test_another_process_takes_the_stores_of_the_first(tokenizer, tmp_path: Path, own_source: bool) -> None:
    """As ranks do: by then a function may yield other rows, and a file have changed."""
    module, file = tmp_path / "rows.py", tmp_path / "a.jsonl"
    write(file, list("abcd"))
    module.write_text(ROWS.format(texts="'abcd'"))
    config = DataConfig(
        [str(file), f"{module}:rows"],
        eval=f"{module}:rows" if own_source else None,
        num_eval_samples=2,
        cache_dir=str(tmp_path / "cache"),
    )
    first = load_datasets(config, tokenizer, 0)
    write(file, list("efghi"))
    module.write_text(ROWS.format(texts="'ef'"))
    stores = first[0].stores | (first[1].stores if first[1] else {})
    second = load_datasets(config, tokenizer, 0, stores=stores)
    for mine, others in zip(first, second, strict=True):
        assert mine is not None
        assert others is not None
        assert mine.digests == others.digests
        assert all(same(a, b) for a, b in zip(mine.samples, others.samples, strict=True))
    changed = load_datasets(config, tokenizer, 0)[0]
    assert not changed.digests.items() & first[0].digests.items()
    gone = dict.fromkeys(stores, tmp_path / "gone")
    with pytest.raises(DataError, match=r"the token store .*gone is gone; start again"):
        load_datasets(config, tokenizer, 0, stores=gone)


def test_a_function_that_yields_other_rows_each_time(tokenizer, tmp_path: Path) -> None:
    module, cache = tmp_path / "rows.py", tmp_path / "cache"
    module.write_text(f"import random{ROWS.format(texts='[str(random.random()) for _ in range(5)]')}")
    config = DataConfig(f"{module}:rows", num_eval_samples=0, cache_dir=str(cache))
    with pytest.raises(DataError, match=r"rows\.py:rows: called twice, it gave other rows the second time.*a seed"):
        load_datasets(config, tokenizer, 0)
    assert not list(cache.iterdir())
    module.write_text(module.read_text().replace("random.random()", "random.Random(3).random()"))
    assert len(load_datasets(config, tokenizer, 0)[0].samples) == 5


def test_it_is_told_what_is_tokenised_and_how_far_it_is(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, cache, said = write(tmp_path / "a.jsonl", ["a", "b", "c"]), tmp_path / "cache", []
    config = DataConfig(name, num_eval_samples=0, cache_dir=str(cache))
    monkeypatch.setattr(progress, "SAY_EVERY_S", 0.0)
    load_datasets(config, tokenizer, 0, say=said.append)
    assert said[0] == f"data: {name} is tokenised, once: its tokens are kept in {cache}"
    assert [text.partition(" rows so far, ")[0] for text in said[1:]] == [f"data: {name}: {n}" for n in (1, 2, 3)]
    load_datasets(config, tokenizer, 0, say=said.append)
    assert len(said) == 4, "the tokens were there"
    write(tmp_path / "a.jsonl", ["d"])
    monkeypatch.undo()
    load_datasets(config, tokenizer, 0, say=said.append)
    assert len(said) == 5, "what is quick is not told of twice"


def test_cache_that_cannot_be_written(tokenizer, tmp_path: Path) -> None:
    config = DataConfig(write(tmp_path / "a.jsonl", ["a"]), cache_dir=str(tmp_path / "a.jsonl" / "cache"))
    with pytest.raises(DataError, match=r"data\.cache_dir: .* cannot be written.*choose another folder"):
        load_datasets(config, tokenizer, 0)


def test_two_that_write_the_same_store(tmp_path: Path) -> None:
    sample = Sample(np.arange(5, dtype=np.int32), np.arange(5) > 2, 0)
    report = DatasetReport(1, 1, 5, 2, 0, {})

    def write_one(writer: StoreWriter) -> DatasetReport:
        writer.add(sample, False)
        return report

    def write_while_another_does(writer: StoreWriter) -> DatasetReport:
        open_or_write(tmp_path, "key", write_one)
        return write_one(writer)

    assert same(open_or_write(tmp_path, "key", write_while_another_does)[0], sample)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_killed_writer_leaves_nothing_to_those_after_it(tmp_path: Path) -> None:
    """Its draft is removed by whoever writes next, that of one who lives is not."""
    sample = Sample(np.arange(5, dtype=np.int32), np.arange(5) > 2, 0)
    begun, goes_on = os.pipe()

    def write_one(writer: StoreWriter) -> DatasetReport:
        writer.add(sample, False)
        return DatasetReport(1, 1, 5, 2, 0, {})

    def write_for_ever(writer: StoreWriter) -> DatasetReport:
        os.write(goes_on, b".")
        hang()
        raise AssertionError

    living, killed = (Child(lambda: open_or_write(tmp_path, "a" * 32, write_for_ever)) for _ in range(2))
    assert os.read(begun, 1) + os.read(begun, 1) == b".."
    killed.kill()
    assert same(open_or_write(tmp_path, "b" * 32, write_one)[0], sample)
    names = {path.name.partition(".")[0]: path for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert set(names) == {"a" * 32, "b" * 32}
    assert len(list(tmp_path.iterdir())) == 3, "two and a lock"
    living.kill()
    open_or_write(tmp_path, "c" * 32, write_one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b" * 32, "c" * 32]


def test_a_damaged_store(tmp_path: Path) -> None:
    def write_two(writer: StoreWriter) -> DatasetReport:
        for number in range(2):
            writer.add(Sample(np.arange(5, dtype=np.int32), np.arange(5) > 2, number), False)
        return DatasetReport(2, 2, 10, 4, 0, {})

    open_or_write(tmp_path, "key", write_two)
    for name in ("input_ids.bin", "index.bin", "report.json"):
        path = tmp_path / "key" / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2 - 1])
        with pytest.raises(DataError, match=r"key is damaged .*: delete it"):
            open_or_write(tmp_path, "key", write_two)
        path.write_bytes(whole)
    assert len(open_or_write(tmp_path, "key", write_two)) == 2


def test_a_crash_leaves_no_store(tokenizer, tmp_path: Path) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    path.write_text(json.dumps(long_row()) + "\n{\n", encoding="utf-8")
    with pytest.raises(DataError, match=":2: not JSON"):
        load_datasets(DataConfig(str(path), cache_dir=str(cache)), tokenizer, 0)
    assert not list(cache.iterdir())


def test_rows_are_held_out_by_weight_and_never_trained_on(tokenizer, tmp_path: Path) -> None:
    sources: list[DataSource | str] = [
        DataSource(write(tmp_path / "a.jsonl", [f"a{i}" * (1 + i % 3) for i in range(20)]), 3.0),
        DataSource(write(tmp_path / "b.jsonl", [f"b{i}" for i in range(10)])),
    ]
    options = {"num_eval_samples": 8, "cache_dir": str(tmp_path / "cache"), "max_length": 16, "long_samples": "split"}
    train, held_out = load_datasets(DataConfig(sources, **options), tokenizer, 5)
    assert held_out is not None
    trained, held = ({s.sample_id for s in data.samples} for data in (train, held_out))
    assert trained | held == set(range(30))
    assert not trained & held
    assert (len([i for i in held if i < 20]), len([i for i in held if i >= 20])) == (6, 2)
    assert held_out.report.num_rows == 8
    assert train.report.num_rows == 22
    assert train.report.num_tokens == sum(len(s) for s in train.samples)
    assert held_out.report.num_loss_tokens == sum(s.num_loss_tokens for s in held_out.samples)
    with pytest.raises(DataError, match=r"a\.jsonl has 20 usable rows, 21 of them to be held out"):
        load_datasets(DataConfig(sources, **{**options, "num_eval_samples": 28}), tokenizer, 5)


@pytest.mark.parametrize("own_source", [False, True])
def test_rows_that_are_left_out_are_told_once(tokenizer, tmp_path: Path, own_source: bool) -> None:
    """Those that are skipped belong to the set that their source is for, those that are truncated to where they are."""
    path, cache = tmp_path / "a.jsonl", str(tmp_path / "cache")
    rows = [long_row("why?" if number % 2 else "why " * 40) for number in range(20)] + [{"messages": []}] * 30
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"num_eval_samples": 6, "eval": str(path)} if own_source else {"num_eval_samples": 6}
    train, held_out = load_datasets(DataConfig(str(path), max_length=40, cache_dir=cache, **options), tokenizer, 0)
    assert held_out is not None
    for data, tells in ((train, True), (held_out, own_source)):
        told = data.report
        assert told.num_samples == len(data.samples) == (6 if data is held_out else 20 if own_source else 14)
        assert told.skipped == ({"no `messages` list": 30} if tells else {})
        assert told.num_rows == told.num_samples + 30 * tells
        assert told.num_truncated == sum(sample.sample_id % 2 == 0 for sample in data.samples)
