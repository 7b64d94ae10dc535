"""What one running engine does, dense and sparse: its rows are those of transformers, preflight trusts it as long as it
is sound and finds every fault that engines were seen to commit without a word, it sleeps and wakes, and stays small.

One engine serves all tests of a model, for starting one is most of their time; ending one ends all engines of a
process, so none may start another beside it.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from kdflow.config import TeacherConfig
from kdflow.errors import ConfigError, TeacherFault
from kdflow.teacher import Teacher
from kdflow.teacher.preflight import Preflight
from kdflow.types import Microbatch, Sample
from support.sglang import MODELS
from support.sglang_engine import FAULTS, Reference, assert_rows, client_of, needs_sglang, random_ids, started

pytestmark = [needs_sglang, pytest.mark.timeout(400)]
CHUNK = 64


@dataclass(frozen=True)
class Served:
    """An engine with the plugin of support/sglang_faults, whose file `fault` chooses one."""

    teacher: Teacher
    model: Path
    reference: Reference
    fault: Path

    def preflight(self, model: Path | None = None) -> Preflight:
        config = TeacherConfig(model=str(model or self.model), backend="sglang", dtype="float32", device="cpu")
        return Preflight(config, self.teacher)


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model, fault = models(request.param), tmp_path_factory.mktemp("engine") / "fault"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_FAULT", str(fault))
        patch.syspath_prepend(FAULTS)
        with started("sglang", model, chunked_prefill_size=CHUNK, max_running_requests=48) as teacher:
            yield Served(teacher, model, Reference(model), fault)


on_llama = pytest.mark.parametrize("served", MODELS[:1], indirect=True)  # the others differ in nothing that matters


def test_rows_in_chunks(served: Served) -> None:
    """Prompts of 200 tokens in chunks of 64, beside short ones."""
    assert_rows(
        served.teacher, served.reference, [random_ids(n, length) for n, length in enumerate((200, 5, 70, 200, 2))]
    )


def test_nothing_of_a_prefix_is_missing(served: Served) -> None:
    """The same prompts again, longer ones that begin so, and twice the same in one batch."""
    first = [random_ids(30, 90), random_ids(31, 20)]
    longer = [np.concatenate([first[0], random_ids(32, 40)]), np.concatenate([first[1], random_ids(33, 3)])]
    for samples in (first, first, longer, [first[0], first[0]]):
        assert_rows(served.teacher, served.reference, samples)


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


def test_sixty_four_in_flight(served: Served) -> None:
    teacher, reference = served.teacher, served.reference
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
    assert teacher.serve(limit=40)  # in two parts, as with teacher.check_every
    assert not teacher.serve(limit=None)
    thread.join(60)
    # Records overlap in the engine; their times are parts of the whole.
    assert all(seconds >= 0 for seconds in prefill_s)
    assert 0 < sum(prefill_s) <= time.monotonic() - begin
    assert len(received) == len(microbatches)
    for microbatch, rows in zip(microbatches, received, strict=True):
        ends = np.cumsum(microbatch.sequence_lengths)[:-1]
        hidden = torch.cat([reference(ids) for ids in np.split(microbatch.input_ids, ends)])
        torch.testing.assert_close(rows, hidden[torch.from_numpy(microbatch.loss_rows).long()], atol=1e-4, rtol=0)


@on_llama
def test_samples_that_are_too_long_are_told_at_the_start(served: Served) -> None:
    """The longest that is allowed is taken; it is 6 tokens shorter than the model's own longest."""
    message = r"takes samples of 1018 tokens at most, got 1019; .* set context_length to 1025"
    with (
        pytest.raises(ConfigError, match=message),
        client_of(served.teacher, num_slots=1, tokens=1024, longest_sample=1019),
    ):
        pass
    with client_of(served.teacher, num_slots=1, tokens=1024, longest_sample=1018):
        assert_rows(served.teacher, served.reference, [random_ids(8, 1018)])
    with pytest.raises(TeacherFault, match=r"SGLang refuses a request: .*1018 tokens.* need a larger"):
        served.teacher.hidden_rows([random_ids(8, 1019)])


def test_preflight_trusts_it(served: Served) -> None:
    served.preflight().check_again()


@on_llama
def test_silent_faults_are_found(served: Served) -> None:
    """Each is what an engine was seen to hand over without a word."""
    sound = served.preflight()
    for name, message in (
        ("rows_of_another_request", r"distinct prompts in one batch: .* rows of request \d were given to request"),
        ("shift_behind_cached_prefix", r"prompts that begin with earlier ones: .* are shifted by -?3"),
        ("before_norm", "they were taken before the final norm"),
        ("no_weights", r"the teacher is uniform: .* keep a backup"),
    ):
        served.fault.write_text(name)
        with pytest.raises(TeacherFault, match=message):
            served.preflight()
    with pytest.raises(TeacherFault, match=r"teacher changed: .* They are all zero\. Likely its weights were lost"):
        sound.check_again()
    served.fault.write_text("rows_of_another_request")
    with pytest.raises(TeacherFault, match="teacher changed: hidden states of probe 0 differ"):
        sound.check_again()
    served.fault.unlink()
    sound.check_again()


@on_llama
def test_logit_scale_that_the_engine_ignores(served: Served, tmp_path: Path) -> None:
    model = shutil.copytree(served.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "logit_scale": 0.5}))
    with pytest.raises(TeacherFault, match=r"without its logit scale; the config says logit scale 0\.5"):
        served.preflight(model)


@on_llama
def test_it_wakes_as_the_same_teacher(served: Served) -> None:
    """Asleep right behind a batch, several times; with weights that sleep has cost it the probe fails."""
    preflight = served.preflight()
    samples = [random_ids(n, length) for n, length in enumerate((90, 7))]
    before = served.teacher.hidden_rows(samples)
    for _ in range(3):
        served.teacher.sleep()
        served.teacher.wake_up()
        preflight.check_again()
        assert all(map(torch.equal, served.teacher.hidden_rows(samples), before))
    served.teacher.sleep()
    served.fault.write_text("no_weights")
    served.teacher.wake_up()
    with pytest.raises(TeacherFault, match="teacher changed"):
        preflight.check_again()
    served.fault.unlink()


WARM_UP, COUNTED = 200, 1000
LENGTH, SAMPLES = 40, 4


def own_bytes() -> int:
    """Memory of this process and its children that is no file and no slot of a ring."""
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(info.rss - info.shared for info in (process.memory_info() for process in tree))


@on_llama
def test_memory_stays_flat(served: Served) -> None:
    """Over a thousand microbatches it grows by less than a tenth of the rows that were handed over."""
    teacher = served.teacher
    microbatch = Microbatch.pack([Sample(random_ids(n, LENGTH), np.ones(LENGTH, bool), n) for n in range(SAMPLES)])
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
    assert teacher.serve(limit=WARM_UP)
    before = own_bytes()
    assert not teacher.serve(limit=None)
    grown = own_bytes() - before
    thread.join(60)
    assert taken == [(microbatch.num_loss_tokens, teacher.hidden_size)] * (WARM_UP + COUNTED)
    print(f"grew by {grown / 2**20:.1f} MiB over {COUNTED} microbatches, {handed_over / 2**20:.0f} MiB of rows")
    assert grown < handed_over / 10
