from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kdflow.data import ChatTokenizer
from kdflow.errors import DataError
from kdflow.types import Microbatch, Sample
from support.tiny import CHAT_TEMPLATE, make_conversations, make_tokenizer

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


def encode(chat: ChatTokenizer, messages: list[dict], sample_id: int = 0) -> Sample:
    (sample,) = chat.tokenize([chat.render(messages)], [sample_id])
    return sample


def said(sample, tokenizer) -> str:
    return tokenizer.decode(sample.input_ids[sample.loss_mask])


def test_only_assistant_turns_enter_the_loss(tokenizer) -> None:
    sample = encode(ChatTokenizer(tokenizer), TURNS, 3)
    assert said(sample, tokenizer) == "First answer.<|im_end|>Second answer.<|im_end|>"
    assert sample.sample_id == 3
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == whole


def test_the_row_before_the_answer_predicts_its_first_token(tokenizer) -> None:
    sample = encode(ChatTokenizer(tokenizer), TURNS)
    microbatch = Microbatch.pack([sample, sample])
    labels = microbatch.shift_labels()
    assert tokenizer.decode(labels) == 2 * "First answer.<|im_end|>Second answer.<|im_end|>"
    assert len(microbatch.loss_rows) == 2 * sample.num_loss_tokens
    assert microbatch.loss_rows.max() < microbatch.num_tokens - 1


def test_no_assistant_turn(tokenizer) -> None:
    with pytest.raises(DataError, match=r"no assistant turn \(it has system, user\)"):
        encode(ChatTokenizer(tokenizer), TURNS[:2])


def test_template_that_rewrites_history(tokenizer) -> None:
    tokenizer = make_tokenizer("abc " * 20)
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode(ChatTokenizer(tokenizer), TURNS)


def test_no_template(tokenizer) -> None:
    tokenizer = make_tokenizer("abc " * 20)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        ChatTokenizer(tokenizer)


def test_shift_labels_are_int64(tokenizer) -> None:
    sample = encode(ChatTokenizer(tokenizer), TURNS)
    assert Microbatch.pack([sample]).shift_labels().dtype == np.int64


def test_the_last_turn_alone(tokenizer) -> None:
    sample = encode(ChatTokenizer(tokenizer, loss_turns="last"), TURNS)
    assert said(sample, tokenizer) == "Second answer.<|im_end|>"


def test_other_roles_enter_the_loss_without_their_headers(tokenizer) -> None:
    chat = ChatTokenizer(tokenizer, loss_roles=["user", "system"])
    assert said(encode(chat, TURNS), tokenizer) == "Be brief.<|im_end|>One?<|im_end|>Two?<|im_end|>"
    both = ChatTokenizer(tokenizer, loss_roles=["user", "assistant"], loss_turns="last")
    assert said(encode(both, TURNS), tokenizer) == "Second answer.<|im_end|>"
    assert said(encode(both, TURNS[:4]), tokenizer) == "Two?<|im_end|>"


def test_role_that_no_row_has(tokenizer) -> None:
    with pytest.raises(DataError, match=r"no asistant turn \(it has assistant, system, user\)"):
        encode(ChatTokenizer(tokenizer, loss_roles=["asistant"]), TURNS)


def test_prompt_that_begins_the_answer() -> None:
    tokenizer = make_tokenizer("First Second answer think " * 20)
    assert isinstance(tokenizer.chat_template, str)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    thought = [TURNS[1], {"role": "assistant", "content": "<think>\nHm.</think>First."}]
    assert said(encode(ChatTokenizer(tokenizer), thought), tokenizer) == "Hm.</think>First.<|im_end|>"
    assert said(encode(ChatTokenizer(tokenizer), TURNS[:3]), tokenizer) == "First answer.<|im_end|>"


def test_the_last_turn_survives_a_template_that_rewrites_earlier_ones() -> None:
    tokenizer = make_tokenizer("First Second answer " * 20)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}[...]{% else %}"
        "{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"rewrites earlier turns.*loss_turns=last"):
        encode(ChatTokenizer(tokenizer), TURNS)
    sample = encode(ChatTokenizer(tokenizer, loss_turns="last"), TURNS)
    assert said(sample, tokenizer) == "Second answer."


TOOLS = [{"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
WITH_TOOLS = [
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": "Noon."},
]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<tool>{{ t.function.name }}</tool>{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_tool_calls_are_as_the_template_has_them() -> None:
    tokenizer = make_tokenizer("clock zone UTC Noon When tool call " * 20)
    tokenizer.chat_template = TOOL_TEMPLATE
    chat = ChatTokenizer(tokenizer)
    (sample,) = chat.tokenize([chat.render(WITH_TOOLS, TOOLS)], [0])
    assert said(sample, tokenizer) == '<call>clock {"zone": "UTC"}</call><|im_end|>Noon.<|im_end|>'
    assert "<tool>clock</tool><|im_start|>user" in tokenizer.decode(sample.input_ids)


CALLS_BY_ID = TOOL_TEMPLATE.replace("{{ c.function.name }} {{ c.function.arguments | tojson }}", "{{ c.id }}")
CALLS_AS_TEXT = TOOL_TEMPLATE.replace("c.function.arguments | tojson", "c.function.arguments + ''")
FIRST_CALL = TOOL_TEMPLATE.replace("in m.tool_calls or []", "in (m.tool_calls or [])[:1]")
STRICT_ABOUT_CALLS = TOOL_TEMPLATE.replace(
    "<|im_end|>\n",
    "{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('who asked?') }}"
    "{% endif %}<|im_end|>\n",
)
TEXT_CALL = {"function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}

UNREADABLE_CALL = {"function": {"name": "clock", "arguments": "UTC"}}


def calling(*calls: dict, **message) -> list[dict]:
    return [WITH_TOOLS[0], {"role": "assistant", "content": "", **message, "tool_calls": [*calls]}, *WITH_TOOLS[2:]]


def with_template(template: str, **options) -> ChatTokenizer:
    tokenizer = make_tokenizer("clock zone UTC Noon When tool call " * 20)
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer, **options)


@pytest.mark.parametrize(
    "template, messages, text",
    [
        (CALLS_BY_ID, calling({"id": "clock:0", **CALL}), "<call>clock:0</call><|im_end|>"),
        (CALLS_AS_TEXT, calling(TEXT_CALL), '<call>clock {"zone": "UTC"}</call><|im_end|>'),
        (CALLS_AS_TEXT, calling(CALL), '<call>clock {"zone": "UTC"}</call><|im_end|>'),
        (TOOL_TEMPLATE, calling(TEXT_CALL), '<call>clock {"zone": "UTC"}</call><|im_end|>'),
        (TOOL_TEMPLATE, calling(UNREADABLE_CALL), '<call>clock "UTC"</call><|im_end|>'),
        (FIRST_CALL, calling(CALL), '<call>clock {"zone": "UTC"}</call><|im_end|>'),
        (STRICT_ABOUT_CALLS, calling(CALL), '<call>clock {"zone": "UTC"}</call><|im_end|>'),
        (TOOL_TEMPLATE, calling(CALL, CALL), 2 * '<call>clock {"zone": "UTC"}</call>' + "<|im_end|>"),
        (CHAT_TEMPLATE, calling(content="I look."), "I look.<|im_end|>"),  # an empty list of them
    ],
)
def test_calls_are_seen_however_a_template_writes_them(template: str, messages: list[dict], text: str) -> None:
    chat = with_template(template).render(messages)
    assert chat.text[slice(*chat.spans[0])] == text


@pytest.mark.parametrize("loss_turns", ["all", "last"])
@pytest.mark.parametrize(
    "template, messages",
    [
        (CHAT_TEMPLATE, calling(CALL)),
        (CHAT_TEMPLATE, calling(TEXT_CALL)),
        (CHAT_TEMPLATE, calling(CALL, content="I call clock with UTC.")),
        (CHAT_TEMPLATE, [{"role": "user", "content": "When?", "tool_calls": [CALL]}, *WITH_TOOLS[2:]]),
        (FIRST_CALL, calling(CALL, {"function": {"name": "calendar", "arguments": {}}})),
    ],
)
def test_tool_calls_that_the_template_leaves_out(template: str, messages: list[dict], loss_turns: Any) -> None:
    """The turn would be its end alone, and the student learn to say nothing."""
    with pytest.raises(DataError, match="the chat template leaves out the tool calls: write them into `content`"):
        with_template(template, loss_turns=loss_turns).render(messages)


def test_tools_that_the_template_leaves_out() -> None:
    with pytest.raises(DataError, match="the chat template leaves out `tools`: take the column out"):
        with_template(CHAT_TEMPLATE).render(TURNS, TOOLS)
    chat = with_template(CHAT_TEMPLATE)
    assert chat.render(TURNS, []) == chat.render(TURNS)


def test_a_turn_without_text_is_its_end(tokenizer) -> None:
    """Without calls nothing was left out: there the speaker had nothing to say, or had thought and said nothing."""
    for told in ({"content": ""}, {"content": "", "reasoning_content": "Hm."}):
        sample = encode(ChatTokenizer(tokenizer), [TURNS[1], {"role": "assistant", **told}])
        assert said(sample, tokenizer) == "<|im_end|>"


def test_roles_that_the_template_does_not_know(tokenizer) -> None:
    strict = make_tokenizer("abc " * 20)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="leaves out what role 'narrator' says"):
        encode(ChatTokenizer(strict), [{"role": "narrator", "content": "Once."}, *TURNS[1:3]])
    strict.chat_template = "{{ raise_exception('only user and assistant') }}"
    with pytest.raises(DataError, match="refuses the messages: only user and assistant"):
        encode(ChatTokenizer(strict), TURNS)
    strict.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(DataError, match="refuses the messages: can only concatenate str"):
        encode(ChatTokenizer(strict), TURNS)
    narrated = encode(ChatTokenizer(tokenizer), [{"role": "narrator", "content": "Once."}, *TURNS[1:3]])
    assert "narrator\nOnce." in tokenizer.decode(narrated.input_ids)


def test_many_at_once_are_what_transformers_makes_of_each() -> None:
    """Real text, whole, although the tokenizer was told before to cut and to pad."""
    rows = [row["messages"] for row in make_conversations()]
    tokenizer = make_tokenizer("\n".join(m["content"] for messages in rows for m in messages))
    chat = ChatTokenizer(tokenizer)
    rendered = [chat.render(messages) for messages in rows]
    tokenizer(["a b c d", "a"], truncation=True, max_length=2, padding=True)
    samples = chat.tokenize(rendered, range(len(rows)))
    for number, (sample, one) in enumerate(zip(samples, rendered, strict=True)):
        expected = tokenizer(one.text, add_special_tokens=False, return_offsets_mapping=True)
        assert sample.sample_id == number
        assert sample.input_ids.tolist() == expected["input_ids"]
        ((begin, end),) = one.spans
        inside = [begin <= start < stop <= end for start, stop in expected["offset_mapping"]]
        assert sample.loss_mask.tolist() == inside
        assert any(inside)
