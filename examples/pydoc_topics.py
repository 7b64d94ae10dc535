"""Questions and answers from the Python language reference that CPython carries with it.

    data:
      train: examples/pydoc_topics.py:conversations

`pydoc_data.topics` is the text behind `help()`: 79 topics of the reference as plain text.
Every documented name becomes a question about it, and every section a question about its
subject, with the reference's own words as the answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

MAX_ANSWER_CHARS = 900

# An unindented signature such as `str.find(sub[, start[, end]])`, then an indented body.
_ENTRY = re.compile(r"^(?P<signature>[\w.]+\(.*\))\n\n(?P<body>(?: {3}.*\n|\n)+)", re.MULTILINE)
_HEADING = re.compile(r"^(?P<title>\S.*)\n([*=\-~^])\2{2,}\n", re.MULTILINE)


def conversations() -> Iterator[dict[str, Any]]:
    """Rows with `messages`, in a fixed order, each question once."""
    asked: set[str] = set()
    for _, text in sorted(topics.items()):
        for question, answer in (*_entries(text + "\n"), *_sections(text)):
            if question not in asked:
                asked.add(question)
                yield {
                    "messages": [
                        {"role": "user", "content": question},
                        {"role": "assistant", "content": answer},
                    ]
                }


def _entries(text: str) -> Iterator[tuple[str, str]]:
    for entry in _ENTRY.finditer(text):
        body = re.sub(r"^ {3}", "", entry["body"], flags=re.MULTILINE)
        yield f"What does `{entry['signature']}` do in Python?", _first_paragraphs(body)


def _sections(text: str) -> Iterator[tuple[str, str]]:
    parts = _HEADING.split(text)
    # split() gives the text before the first heading, then (title, underline, body) each.
    for title, body in zip(parts[1::3], parts[3::3], strict=True):
        for number, answer in enumerate(_pieces(_ENTRY.sub("", body))):
            name = title.replace('"', "`")
            if number == 0:
                yield f"Explain what the Python language reference says about {name}.", answer
            else:
                yield (
                    f"Go on with {name} in the Python language reference, part {number + 1}.",
                    answer,
                )


def _pieces(text: str) -> Iterator[str]:
    """Whole paragraphs, joined up to MAX_ANSWER_CHARS."""
    piece = ""
    for paragraph in re.split(r"\n{2,}", text.strip()):
        if piece and len(piece) + len(paragraph) > MAX_ANSWER_CHARS:
            yield piece
            piece = ""
        piece = f"{piece}\n\n{paragraph}".strip("\n")
    if piece:
        yield piece


def _first_paragraphs(text: str) -> str:
    return next(_pieces(text), "")
