"""How far a long reading is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from kdflow.data.sources import Row

SAY_EVERY_S = 10.0


def told(rows: Iterable[Row], name: str, say: Callable[[str], None]) -> Iterator[Row]:
    """The rows as they come; now and then it is said how many there were."""
    began = said = time.monotonic()
    for number, row in enumerate(rows, 1):
        yield row
        now = time.monotonic()
        if now - said >= SAY_EVERY_S:
            said = now
            say(f"data: {name}: {number:,} rows so far, {number / max(now - began, 1e-9):,.0f} a second")
