from __future__ import annotations

import numpy as np
import pytest

from kdflow.config import DataConfig
from kdflow.data import ChatTokenizer
from kdflow.data.dataset import tokenize_rows
from kdflow.errors import DataError
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


def said(sample, tokenizer) -> str:
    return tokenizer.decode(sample.input_ids[sample.loss_mask])


def test_only_assistant_turns_enter_the_loss(tokenizer) -> None:
    sample = ChatTokenizer(tokenizer).encode(TURNS, 3)
    assert said(sample, tokenizer) == "First answer.<|im_end|>Second answer.<|im_end|>"
    assert sample.sample_id == 3
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == whole


def test_the_row_before_the_answer_predicts_its_first_token(tokenizer) -> None:
    from kdflow.types import Microbatch

    sample = ChatTokenizer(tokenizer).encode(TURNS, 0)
    microbatch = Microbatch.pack([sample, sample])
    labels = microbatch.shift_labels()
    assert tokenizer.decode(labels) == 2 * "First answer.<|im_end|>Second answer.<|im_end|>"
    assert len(microbatch.loss_rows) == 2 * sample.num_loss_tokens
    assert microbatch.loss_rows.max() < microbatch.num_tokens - 1


def test_no_assistant_turn(tokenizer) -> None:
    with pytest.raises(DataError, match="no assistant turn"):
        ChatTokenizer(tokenizer).encode(TURNS[:2], 0)


def test_template_that_rewrites_history(tokenizer) -> None:
    tokenizer = make_tokenizer("abc " * 20)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        ChatTokenizer(tokenizer).encode(TURNS, 0)


def test_no_template(tokenizer) -> None:
    tokenizer = make_tokenizer("abc " * 20)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ChatTokenizer(tokenizer)


def config(**options) -> DataConfig:
    return DataConfig(train="x", **options)


def long_row(question: str = "why " * 40, answer: str = "because") -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_long_prompt_is_cut_from_the_left(tokenizer) -> None:
    data = tokenize_rows([long_row()], tokenizer, config(max_length=40), "x")
    (sample,) = data.samples
    assert len(sample) == 40
    assert said(sample, tokenizer) == "because<|im_end|>"
    assert data.report.num_truncated == 1


def test_long_answer_keeps_its_beginning(tokenizer) -> None:
    answer = "because of this " * 20
    (sample,) = tokenize_rows([long_row("why?", answer)], tokenizer, config(max_length=30), "x").samples
    assert len(sample) == 30
    assert answer.startswith(said(sample, tokenizer))
    assert sample.num_loss_tokens == 29


def test_long_samples_skipped_and_counted(tokenizer) -> None:
    rows = [long_row(), long_row("short?"), {"messages": []}, {"text": "no chat"}, {"messages": TURNS[:2]}]
    report = tokenize_rows(rows, tokenizer, config(max_length=40, long_samples="skip"), "x").report
    assert (report.num_rows, report.num_samples) == (5, 1)
    assert report.skipped == {
        "longer than max_length 40": 1,
        "no `messages` list": 2,
        "no assistant turn": 1,
    }
    assert "1 skipped: no assistant turn" in str(report)


def test_no_usable_row(tokenizer) -> None:
    with pytest.raises(DataError, match=r"x: no row can be used .*2 skipped: no assistant turn"):
        tokenize_rows([{"messages": TURNS[:1]}] * 2, tokenizer, config(), "x")


def test_shift_labels_are_int64(tokenizer) -> None:
    from kdflow.types import Microbatch

    sample = ChatTokenizer(tokenizer).encode(TURNS, 0)
    assert Microbatch.pack([sample]).shift_labels().dtype == np.int64
