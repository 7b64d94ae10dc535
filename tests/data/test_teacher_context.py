"""A context that the teacher alone reads: the rows that come over the ring are those of its own conversation."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from kdflow.config import DataConfig, TeacherConfig
from kdflow.data import load_datasets, pack_step
from kdflow.teacher import TEACHERS
from kdflow.teacher.base import TeacherRings
from kdflow.transport import HiddenRing, HiddenStatesClient, RequestRing, request_bytes
from support.tiny import make_config, make_tokenizer

CONTEXT = "Answer as a pirate would."
BUDGET = 160


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


ROWS = [
    {"messages": turns("Where?", "Over there, by the big tree.")},
    {"messages": turns("Who?", "I."), "teacher_system": "Be polite. " * 3},
    {"messages": turns("Why?", "So."), "teacher_messages": turns("Because of what, and why?", "So.")},
    {"messages": turns("What?", "This and that. " * 4), "teacher_system": ""},  # the teacher reads the same
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    torch.manual_seed(0)
    LlamaForCausalLM(make_config()).save_pretrained(folder / "teacher")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return folder


def test_rows_are_those_of_the_teachers_own_context(folder: Path) -> None:
    tokenizer = make_tokenizer("Where Who Why What " * 20)
    data, _ = load_datasets(
        DataConfig(str(folder / "rows.jsonl"), num_eval_samples=0, teacher_context=CONTEXT), tokenizer, 0
    )
    step = pack_step(data.samples, tokens_per_microbatch=BUDGET)
    assert len(step.microbatches) > 1
    reference = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32).base_model
    found = {}
    for microbatch, rows in zip(step.microbatches, served_rows(folder, step.microbatches), strict=True):
        assert max(microbatch.num_tokens, microbatch.for_teacher().num_tokens) <= BUDGET
        counts = [data.samples[i].num_loss_tokens for i in microbatch.sample_ids]
        found.update(zip(microbatch.sample_ids, rows.split(counts), strict=True))
    for number, (row, sample) in enumerate(zip(ROWS, data.samples, strict=True)):
        own = row.get("teacher_system", CONTEXT)
        messages = row.get("teacher_messages") or [{"role": "system", "content": own}, *row["messages"]]
        text = str(tokenizer.apply_chat_template(messages if own else row["messages"], tokenize=False))
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            hidden = reference(ids).last_hidden_state[0]
        answer = torch.from_numpy(sample.input_ids[sample.loss_mask]).long()
        begin = ids.shape[1] - len(answer) - 1  # the template ends in a line break
        assert torch.equal(ids[0, begin:-1], answer)
        torch.testing.assert_close(found[number], hidden[begin - 1 : -2], rtol=1e-4, atol=1e-5)


def served_rows(folder: Path, microbatches) -> list[torch.Tensor]:
    """Of the teacher that a run starts, in a thread."""
    config = TeacherConfig(str(folder / "teacher"), dtype="float32", device="cpu")
    with (
        RequestRing.create(name="requests", num_slots=2, slot_bytes=request_bytes(BUDGET)) as requests,
        HiddenRing.create(name="hidden", num_slots=2, slot_bytes=BUDGET * 48 * 4) as hidden,
        HiddenRing.attach(hidden.handle, role="consumer") as consumer,
        RequestRing.attach(requests.handle, role="producer") as producer,
    ):
        teacher = TEACHERS.get("hf")(config, gpu=0)
        teacher.attach(TeacherRings(requests.handle, (hidden.handle,), "host", 20.0, BUDGET))
        thread = threading.Thread(target=lambda: teacher.serve(limit=len(microbatches)), daemon=True)
        thread.start()
        found = []
        client = HiddenStatesClient({"": producer}, consumer, rank=0, timeout_s=20.0)
        for pending in client.prefetch(microbatches):
            with pending:
                found.append(pending.tensor().clone())
        thread.join(20.0)
        assert not thread.is_alive()
        teacher.close()
        return found
