"""Teachers started in the test's process, what transformers says beside them, and where faults are planted."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdflow.config import TeacherConfig
from kdflow.teacher import TEACHERS, Teacher
from kdflow.teacher.base import TeacherRings
from kdflow.transport import HiddenRing, HiddenStatesClient, RequestRing, request_bytes
from support.tiny import VOCAB_SIZE

HAS_SGLANG = importlib.util.find_spec("sglang") is not None
needs_sglang = pytest.mark.skipif(not HAS_SGLANG, reason="needs SGLang: make test-sglang")
FAULTS = Path(__file__).with_name("sglang_faults")


@contextmanager
def started(backend: str, model: Path, *, tp_size: int = 1, **engine_args: Any) -> Iterator[Teacher]:
    """A teacher in float32 on the CPU, in this process; its engine's processes end with the block."""
    config = TeacherConfig(
        model=str(model), backend=backend, dtype="float32", device="cpu", tp_size=tp_size, engine_args=engine_args
    )
    teacher = TEACHERS.get(backend)(config, gpu=0)
    try:
        yield teacher
    finally:
        teacher.close()


@contextmanager
def client_of(
    teacher: Teacher, *, num_slots: int, tokens: int, longest_sample: int = 400
) -> Iterator[HiddenStatesClient]:
    """A student's end; leaving it lets the teacher's `serve` return."""
    with (
        RequestRing.create(name="requests", num_slots=num_slots, slot_bytes=request_bytes(tokens)) as requests,
        HiddenRing.create(
            name="hidden", num_slots=num_slots, slot_bytes=tokens * teacher.hidden_size * teacher.dtype.itemsize
        ) as hidden,
    ):
        teacher.attach(TeacherRings(requests.handle, (hidden.handle,), "host", 60.0, longest_sample))
        with (
            HiddenRing.attach(hidden.handle, role="consumer") as consumer,
            RequestRing.attach(requests.handle, role="producer") as producer,
        ):
            yield HiddenStatesClient({"": producer}, consumer, rank=0, timeout_s=60.0)


class Reference:
    """transformers, one sample at a time."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoModelForCausalLM

        self._decoder = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).base_model

    @torch.inference_mode()
    def __call__(self, input_ids: np.ndarray) -> torch.Tensor:
        """(T, H) last hidden states."""
        return self._decoder(torch.from_numpy(input_ids.astype(np.int64))[None]).last_hidden_state[0]


def random_ids(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, length).astype(np.int32)


def assert_rows(teacher: Teacher, reference: Reference, samples: list[np.ndarray]) -> None:
    """What the teacher hands over is the last hidden state, within 1e-4."""
    for sample, rows in zip(samples, teacher.hidden_rows(samples), strict=True):
        torch.testing.assert_close(rows, reference(sample)[:-1], atol=1e-4, rtol=0)
