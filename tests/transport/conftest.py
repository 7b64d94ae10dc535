"""A ring for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdflow.transport.ring import HiddenRing


@pytest.fixture
def ring() -> Iterator[HiddenRing]:
    with HiddenRing.create(name="hidden[0]", num_slots=4, slot_bytes=4096) as made:
        yield made
