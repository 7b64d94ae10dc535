"""Conversations with answers of very different lengths, for ``bench e2e`` on a GPU.

The text is CPython's ``pydoc_data.topics``; a seed decides where it is cut.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

ANSWER_CHARS = (300, 4200)


def conversations() -> Iterator[dict[str, Any]]:
    """Rows with ``messages``, always the same ones."""
    draw = random.Random(0)
    for name, text in sorted(topics.items()):
        start = part = 0
        while start < len(text):
            stop, part = start + draw.randint(*ANSWER_CHARS), part + 1
            yield {
                "messages": [
                    {"role": "user", "content": f"What does the Python reference say on {name!r}, part {part}?"},
                    {"role": "assistant", "content": text[start:stop]},
                ]
            }
            start = stop
