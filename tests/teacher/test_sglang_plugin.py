"""What the plugin does at a ring; SGLang need not be there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kdflow.errors import RingCorrupt, TransportError
from kdflow.teacher.sglang_plugin import Capture, Errand
from kdflow.tracing import OFF
from kdflow.transport import HiddenRing

HIDDEN = torch.arange(12.0).view(3, 4)


@pytest.fixture
def ring() -> Iterator[HiddenRing]:
    with HiddenRing.create(name="hidden", num_slots=2, slot_bytes=1 << 10) as ring:
        yield ring


def take(handle: str, ticket: int = 0, capture: Capture | None = None) -> None:
    """The last two of three rows, computed in one forward."""
    errand = Errand(handle, ticket=ticket, num_rows=2, rows=Errand.pack(np.array([1, 2])))
    (capture or Capture()).take([(0, 3, errand, True)], HIDDEN, OFF)


def test_a_ticket_that_another_has_is_passed_over(ring: HiddenRing) -> None:
    with HiddenRing.attach(ring.handle, role="consumer") as student:
        take(ring.handle)
        take(ring.handle)  # asked for twice
        with student.receive(0, timeout_s=5.0) as slot:
            assert torch.equal(slot.tensor(), HIDDEN[1:])


def test_a_student_that_has_left_is_passed_over(ring: HiddenRing) -> None:
    HiddenRing.attach(ring.handle, role="consumer").close()
    take(ring.handle)
    take(ring.handle, ticket=2)  # would wait for the first


def test_a_ring_that_cannot_be_opened_is_told() -> None:
    with HiddenRing.create(name="hidden", num_slots=1, slot_bytes=64) as gone:
        handle = gone.handle
    with pytest.raises(TransportError, match="cannot open ring handle"):
        take(handle)


def test_a_ring_that_is_corrupt_is_told() -> None:
    """What its last slot says of itself, before the slots' memory, is overwritten."""
    num_slots, page, capture = 64, os.sysconf("SC_PAGE_SIZE"), Capture()
    with (
        HiddenRing.create(name="hidden", num_slots=num_slots, slot_bytes=page) as ring,
        HiddenRing.attach(ring.handle, role="consumer"),
    ):
        take(ring.handle, 0, capture)
        memory = os.fstat(ring.fileno()).st_size - num_slots * page
        os.pwrite(ring.fileno(), b"\xff" * 2 * page, memory - 2 * page)
        with pytest.raises(RingCorrupt, match="slot 63 is in no known phase"):
            take(ring.handle, 63, capture)
