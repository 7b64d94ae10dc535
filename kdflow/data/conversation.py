"""What a row says: the messages that the student reads, and those that the teacher reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdflow.data.sources import Row
from kdflow.data.tool_calls import Message
from kdflow.errors import DataError


@dataclass(frozen=True)
class Conversation:
    """
    Attributes:
        messages: that the student reads.
        teacher_messages: that the teacher reads; None where it reads the same.
        tools: descriptions of tools for the template.
        teacher_name: which teacher the row is for; empty where it does not say.
    """

    messages: list[Message]
    teacher_messages: list[Message] | None
    tools: Sequence[Any] | None
    teacher_name: str


def read_row(row: Row, teacher_context: str | None, teacher_column: str | None) -> Conversation:
    """
    Args:
        teacher_context: a system prompt for the teacher alone, where the row brings nothing of the kind.
        teacher_column: where the row says which teacher it is for.

    Raises:
        DataError: a column is not as it should be.
    """
    messages = _messages(row, "messages")
    own = teacher_context if row.get("teacher_system") is None else row["teacher_system"]
    if row.get("teacher_messages") is not None:
        teacher = _messages(row, "teacher_messages")
    elif isinstance(own, str):
        teacher = _with_system(messages, own) if own else None
    elif own is None:
        teacher = None
    else:
        raise DataError("`teacher_system` is not text")
    tools = row.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError("`tools` is not a list")
    name = None if teacher_column is None else row.get(teacher_column)
    if name is not None and not isinstance(name, str):
        raise DataError(f"`{teacher_column}` is not text")
    _check_characters([messages, teacher, tools, name])
    return Conversation(messages, teacher, tools or None, name or "")


def _messages(row: Row, column: str) -> list[Message]:
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"no `{column}` list")
    return [_message(message, column) for message in messages]


def _message(message: Any, column: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"one of `{column}` without `role`")
    # Tables give every message every key, None where it was not there.
    message = {key: value for key, value in message.items() if value is not None}
    if not message.keys() & {"content", "tool_calls"}:
        raise DataError(f"one of `{column}` with neither `content` nor `tool_calls`")
    if not isinstance(message.get("tool_calls") or [], list):
        raise DataError(f"`tool_calls` of one of `{column}` is not a list")
    return {**message, "content": _text(message.get("content", ""), column)}


def _text(content: Any, column: str) -> str:
    """Of one string, or of parts that are all text, as rows have them that could also hold images."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)
    raise DataError(f"`content` of one of `{column}` is not text")


def _check_characters(told: Any) -> None:
    """JSON can spell one half of a character alone, which nobody can write or tokenise."""
    try:
        json.dumps(told, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise DataError("it holds half of a character (a lone surrogate)") from None


def _with_system(messages: list[Message], context: str) -> list[Message]:
    """The context as the system prompt, before the conversation's own where it has one."""
    first = messages[0]
    if first["role"] != "system":
        return [{"role": "system", "content": context}, *messages]
    return [{**first, "content": f"{context}\n\n{first['content']}"}, *messages[1:]]
