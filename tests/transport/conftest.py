"""A ring for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kdflow.transport.ring import HiddenRing
from support import fake_cuda


@pytest.fixture
def ring() -> Iterator[HiddenRing]:
    with HiddenRing.create(name="hidden[0]", num_slots=4, slot_bytes=4096) as made:
        yield made


@pytest.fixture(scope="session")
def fake_driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of processes that use the fake CUDA driver, with two devices."""
    return {"KDFLOW_CUDA_DRIVER": str(fake_cuda.build(tmp_path_factory.mktemp("fake-cuda")))}
