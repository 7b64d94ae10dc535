"""Memory of the worker and the engine's processes does not grow with what they have answered."""

from __future__ import annotations

import threading

import numpy as np
import psutil
import pytest

from kdflow.types import Microbatch, Sample
from support.sglang_engine import client_of, needs_sglang, random_ids, started

pytestmark = [needs_sglang, pytest.mark.timeout(400)]
WARM_UP, COUNTED = 200, 1000
LENGTH, SAMPLES = 40, 4


def own_bytes() -> int:
    """Memory of this process and its children that is no file and no slot of a ring."""
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(info.rss - info.shared for info in (process.memory_info() for process in tree))


def make_microbatch() -> Microbatch:
    return Microbatch.pack([Sample(random_ids(n, LENGTH), np.ones(LENGTH, bool), n) for n in range(SAMPLES)])


def test_memory_stays_flat(models) -> None:
    """Over a thousand microbatches it grows by less than a tenth of the rows that were handed over."""
    with started("sglang", models("llama")) as teacher:
        microbatch = make_microbatch()
        handed_over = COUNTED * microbatch.num_loss_tokens * teacher.hidden_size * teacher.dtype.itemsize
        ready, taken = threading.Event(), []

        def student() -> None:
            with client_of(teacher, num_slots=4, tokens=LENGTH * SAMPLES) as client:
                ready.set()
                for pending in client.prefetch(microbatch for _ in range(WARM_UP + COUNTED)):
                    with pending:
                        taken.append(pending.tensor().shape)

        thread = threading.Thread(target=student)
        thread.start()
        assert ready.wait(30)
        assert teacher.serve(limit=WARM_UP, idle=lambda: None)
        before = own_bytes()
        assert not teacher.serve(limit=None, idle=lambda: None)
        grown = own_bytes() - before
        thread.join(60)
    assert taken == [(microbatch.num_loss_tokens, teacher.hidden_size)] * (WARM_UP + COUNTED)
    print(f"grew by {grown / 2**20:.1f} MiB over {COUNTED} microbatches, {handed_over / 2**20:.0f} MiB of rows")
    assert grown < handed_over / 10
