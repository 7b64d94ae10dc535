"""Chat templates: from messages to token ids and a loss mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kdflow.errors import DataError
from kdflow.types import Sample


class ChatTokenizer:
    """Applies a tokenizer's own chat template and marks what the assistant said.

    The mask comes from the template itself: the conversation is rendered up to each
    assistant turn with the generation prompt and again with the turn; what is added is
    the assistant's, its end-of-turn token included, white space after it not. So it needs
    no markers in the template, and holds for any template that only appends.

    Raises:
        DataError: no chat template, or no fast tokenizer (character offsets are needed).
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.chat_template is None:
            raise DataError(
                f"tokenizer of {tokenizer.name_or_path}: it has no chat template; "
                "add chat_template.jinja to the model's folder or use an instruct model"
            )
        if not tokenizer.is_fast:
            raise DataError(f"tokenizer of {tokenizer.name_or_path}: a fast tokenizer is needed")
        self._tokenizer = tokenizer

    def encode(self, messages: Sequence[dict[str, str]], sample_id: int) -> Sample:
        """One conversation as a sample.

        Raises:
            DataError: the messages are malformed, none is the assistant's, or the template
                rewrites earlier turns when later ones come.
        """
        spans = []
        text = self._render(messages)
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], add_generation_prompt=True)
            through = self._render(messages[: index + 1])
            if not (through.startswith(before) and text.startswith(through.rstrip())):
                raise DataError("the chat template rewrites earlier turns: no stable loss mask")
            spans.append((len(before), len(through.rstrip())))
        if not spans:
            raise DataError("no assistant turn")
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts, ends = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
        loss_mask = np.zeros(len(starts), dtype=bool)
        for begin, end in spans:
            loss_mask |= (starts >= begin) & (ends <= end) & (ends > starts)
        return Sample(np.asarray(encoded["input_ids"], dtype=np.int32), loss_mask, sample_id)

    def _render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
