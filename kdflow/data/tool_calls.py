"""Tool calls of messages, as rows spell them and as templates want them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]


def spellings(messages: Sequence[Message]) -> list[list[Message]]:
    """The messages with the arguments of calls as objects, and as JSON texts; once where there are none.

    Most templates write an object as JSON themselves, and a text that holds it, which is how OpenAI's API has it, as a
    text within quotes; a few take the text alone.
    """
    if not any(message.get("tool_calls") for message in messages):
        return [list(messages)]
    return [[_spelled(message, how) for message in messages] for how in (_as_object, _as_text)]


def without_last_call(message: Message) -> Message:
    fewer = {**message, "tool_calls": message["tool_calls"][:-1]}
    return fewer if fewer["tool_calls"] else {key: value for key, value in fewer.items() if key != "tool_calls"}


def _spelled(message: Message, how: Callable[[Any], Any]) -> Message:
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_call(call, how) for call in message["tool_calls"]]}


def _call(call: Any, how: Callable[[Any], Any]) -> Any:
    """With `arguments` in the call, or in its `function`."""
    if not isinstance(call, dict):
        return call
    if "arguments" in call:
        call = {**call, "arguments": how(call["arguments"])}
    return {**call, "function": _call(call["function"], how)} if isinstance(call.get("function"), dict) else call


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except ValueError:
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments
