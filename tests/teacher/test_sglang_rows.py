"""What is in the ring is what transformers computes: dense and sparse models on the real engine.

One engine serves the tests of a model; ending one ends all engines of a process, so none may start another beside it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from kdflow.teacher import Teacher
from kdflow.types import Microbatch, Sample
from support.sglang import MODELS
from support.sglang_engine import Reference, assert_rows, client_of, needs_sglang, random_ids, started

pytestmark = needs_sglang
CHUNK = 64


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, models) -> Iterator[tuple[Teacher, Reference]]:
    model = models(request.param)
    with started("sglang", model, chunked_prefill_size=CHUNK, max_running_requests=48) as teacher:
        yield teacher, Reference(model)


def test_rows_in_chunks(served: tuple[Teacher, Reference]) -> None:
    """Prompts of 200 tokens in chunks of 64, beside short ones."""
    assert_rows(*served, [random_ids(n, length) for n, length in enumerate((200, 5, 70, 200, 2))])


def test_nothing_of_a_prefix_is_missing(served: tuple[Teacher, Reference]) -> None:
    """The same prompts again, longer ones that begin so, and twice the same in one batch."""
    first = [random_ids(30, 90), random_ids(31, 20)]
    longer = [np.concatenate([first[0], random_ids(32, 40)]), np.concatenate([first[1], random_ids(33, 3)])]
    for samples in (first, first, longer, [first[0], first[0]]):
        assert_rows(*served, samples)


def make_microbatches() -> list[Microbatch]:
    """64 of them, of 1 to 4 samples of 2 to 150 tokens, loss rows scattered; some have none; one of 330 tokens."""
    rng = np.random.default_rng(5)
    made = []
    for number in range(64):
        lengths = [330] if number == 20 else rng.integers(2, 150, rng.integers(1, 5)).tolist()
        samples = []
        for index, length in enumerate(lengths):
            mask = np.zeros(length, bool) if number % 16 == 7 else rng.random(length) < rng.choice([0.1, 0.6, 1.0])
            samples.append(Sample(random_ids(1000 + 10 * number + index, length), mask, index))
        made.append(Microbatch.pack(samples))
    return made


def test_sixty_four_in_flight(served: tuple[Teacher, Reference]) -> None:
    teacher, reference = served
    microbatches = make_microbatches()
    assert any(m.num_loss_tokens == 0 for m in microbatches)
    received: list[torch.Tensor] = []
    prefill_s: list[float] = []

    def student() -> None:
        with client_of(teacher, num_slots=64, tokens=800) as client:
            ready.set()
            for pending in client.prefetch(microbatches):
                with pending:
                    received.append(pending.tensor().clone())
                    prefill_s.append(pending.prefill_s)

    ready = threading.Event()
    thread = threading.Thread(target=student)
    begin = time.monotonic()
    thread.start()
    assert ready.wait(30)
    assert teacher.serve(limit=40, idle=lambda: None)  # in two parts, as with teacher.check_every
    assert not teacher.serve(limit=None, idle=lambda: None)
    thread.join(60)
    # Records overlap in the engine; their times are parts of the whole.
    assert all(seconds >= 0 for seconds in prefill_s)
    assert 0 < sum(prefill_s) <= time.monotonic() - begin
    assert len(received) == len(microbatches)
    for microbatch, rows in zip(microbatches, received, strict=True):
        ends = np.cumsum(microbatch.sequence_lengths)[:-1]
        hidden = torch.cat([reference(ids) for ids in np.split(microbatch.input_ids, ends)])
        torch.testing.assert_close(rows, hidden[torch.from_numpy(microbatch.loss_rows).long()], atol=1e-4, rtol=0)
