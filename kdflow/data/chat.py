"""Chat templates: from messages to token ids and a loss mask."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import numpy as np
from jinja2 import TemplateError

from kdflow.data.tool_calls import Message, spellings, without_last_call
from kdflow.errors import DataError
from kdflow.types import Sample

_USUAL_ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}
# A template is a program: on a row that it was not made for it fails as programs do.
_FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


@dataclass(frozen=True)
class Chat:
    """A conversation as text.

    Attributes:
        spans: where in it the characters are that enter the loss.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatTokenizer:
    """Applies a tokenizer's own chat template and marks what enters the loss.

    The mask comes from the template itself: the conversation is rendered up to each assistant turn with the generation
    prompt and again with the turn; what is added is the assistant's, its end-of-turn token included, white space after
    it not. So it needs no markers in the template, and holds for any template that only appends. Of other roles, which
    no prompt precedes, it is the text of the message and what the template closes it with.

    Args:
        loss_roles: whose turns are marked.
        loss_turns: all of these turns, or the last one.

    Raises:
        DataError: no chat template, or no fast tokenizer (character offsets are needed).
    """

    def __init__(
        self, tokenizer: Any, *, loss_roles: Iterable[str] = ("assistant",), loss_turns: Literal["all", "last"] = "all"
    ) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"tokenizer of {tokenizer.name_or_path}: it has no chat template; "
                "add chat_template.jinja to the model's folder or use an instruct model"
            )
        if not tokenizer.is_fast:
            raise DataError(f"tokenizer of {tokenizer.name_or_path}: a fast tokenizer is needed")
        self._tokenizer = tokenizer
        self._loss_roles = frozenset(loss_roles)
        self._loss_turns = loss_turns

    def fingerprint(self) -> str:
        """Changes with what this makes of a conversation."""
        decides = [
            self._tokenizer.backend_tokenizer.to_str(),
            self._tokenizer.chat_template,
            sorted(self._loss_roles),
            self._loss_turns,
        ]
        return hashlib.sha256(json.dumps(decides).encode()).hexdigest()

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> Chat:
        """The conversation as the template writes it.

        Args:
            tools: descriptions of tools, for templates that tell the model of them.

        Raises:
            DataError: the template refuses the messages, leaves out one, its tool calls or the tools, or rewrites
                earlier turns when later ones come; no turn is of `loss_roles`.
        """
        turns = [index for index, message in enumerate(messages) if message["role"] in self._loss_roles]
        if not turns:
            roles = ", ".join(sorted({message["role"] for message in messages}))
            raise DataError(f"no {' or '.join(sorted(self._loss_roles))} turn (it has {roles})")
        text, messages = self._render_calls(messages, tools)
        self._check_whole(text, messages, tools)
        if self._loss_turns == "last":
            turns = turns[-1:]
        return Chat(text, tuple(self._span(text, messages, index, tools) for index in turns))

    def _render_calls(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[str, list[Message]]:
        """The text, and the messages as the template takes them."""
        first, *others = spellings(messages)
        try:
            return self._render(first, tools), first
        except DataError:
            for other in others:
                with suppress(DataError):
                    return self._render(other, tools), other
            raise

    def _check_whole(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> None:
        """
        Raises:
            DataError: something that the row says is not in the text. Templates write calls and tools in ways of their
                own, some a call by its id and without its name; so one is left out if the text is the same without it.
        """
        for index, message in enumerate(messages):
            if message["role"] not in _USUAL_ROLES and message["content"].strip() not in text:
                raise DataError(f"the chat template leaves out what role {message['role']!r} says")
            if message.get("tool_calls"):
                fewer = [*messages[:index], without_last_call(message), *messages[index + 1 :]]
                if self._writes(text, fewer, tools):
                    raise DataError(
                        "the chat template leaves out the tool calls: write them into `content`, or use a model whose "
                        "template has them"
                    )
        if tools and self._writes(text, messages, None):
            raise DataError(
                "the chat template leaves out `tools`: take the column out, or use a model whose template has them"
            )

    def _writes(self, text: str, messages: Sequence[Message], tools: Sequence[Any] | None) -> bool:
        try:
            return self._render(messages, tools) == text
        except DataError:  # it misses what was taken out
            return False

    def _span(self, text: str, messages: Sequence[Message], index: int, tools: Sequence[Any] | None) -> tuple[int, int]:
        message = messages[index]
        through = text if index + 1 == len(messages) else self._render(messages[: index + 1], tools)
        stable = text.startswith(through.rstrip())
        if message["role"] == "assistant":
            before = self._render(messages[:index], tools, add_generation_prompt=True)
            begin = _num_common(before, through)
            if begin < len(before):
                # Some prompts begin the answer (with a tag of thinking), which the turn itself need not have.
                stable = stable and begin > len(self._render(messages[:index], tools).rstrip())
        else:
            begin = through.rfind(message["content"].strip())
        if not stable or begin < 0:
            raise DataError(
                "the chat template rewrites earlier turns: no stable loss mask (data.loss_turns=last needs it of the "
                "last one alone)"
            )
        return begin, len(through.rstrip())

    def tokenize(self, chats: Sequence[Chat], sample_ids: Sequence[int]) -> list[Sample]:
        """Samples of rendered conversations, all at once: the tokenizer has threads of its own."""
        # Straight to the engine: transformers would first make lists of five more fields of each token.
        engine = self._tokenizer.backend_tokenizer
        engine.no_truncation()
        engine.no_padding()
        samples = []
        for chat, encoding, sample_id in zip(
            chats, engine.encode_batch([chat.text for chat in chats], add_special_tokens=False), sample_ids, strict=True
        ):
            offsets = np.fromiter(chain.from_iterable(encoding.offsets), np.int64, 2 * len(encoding))
            starts, ends = offsets.reshape(-1, 2).T
            loss_mask = np.zeros(len(starts), dtype=bool)
            for begin, end in chat.spans:
                loss_mask |= (starts >= begin) & (ends <= end) & (ends > starts)
            loss_mask[:1] = False  # nothing comes before it that could predict it
            samples.append(Sample(np.asarray(encoding.ids, dtype=np.int32), loss_mask, sample_id))
        return samples

    def _render(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, add_generation_prompt: bool = False
    ) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages),
                tools=None if tools is None else list(tools),
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except _FAILURES as error:
            raise DataError(f"the chat template refuses the messages: {error}") from None


def _num_common(a: str, b: str) -> int:
    """How many characters both begin with."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
