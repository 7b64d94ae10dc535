"""A Hugging Face teacher and an SGLang teacher of another width, for one student."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from support.run import metrics_of, train
from support.sglang_engine import needs_sglang
from support.tiny import make_config, make_conversations

pytestmark = [needs_sglang, pytest.mark.timeout(600)]


def test_backends_side_by_side(run_config, tiny: Path, tmp_path: Path) -> None:
    """As with two Hugging Face teachers, within 0.1%."""
    torch.manual_seed(5)
    model = LlamaForCausalLM(make_config(num_layers=2, tied=False, hidden_size=64))
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "wide")
    AutoTokenizer.from_pretrained(tiny / "teacher").save_pretrained(tmp_path / "wide")
    rows = [{**row, "expert": ("math", "code")[i % 2]} for i, row in enumerate(make_conversations())]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found = []
    for backend in ("hf", "sglang"):
        teachers = {
            "math": {"model": str(tiny / "teacher"), "dtype": "float32", "num_threads": 1},
            "code": {"model": str(tmp_path / "wide"), "dtype": "float32", "num_threads": 1, "backend": backend},
        }
        config = run_config(
            output_dir=tmp_path / backend,
            teachers=json.dumps(teachers),
            data__train=tmp_path / "rows.jsonl",
            data__teacher_column="expert",
            student__compute_dtype="float32",
            training__tokens_per_microbatch=128,
            training__num_steps=6,
        )
        result = train(config)
        assert result.returncode == 0, result.stderr
        steps = metrics_of(config, "train")
        found.append(
            [m["loss"] for m in steps] + [own["loss"] for m in steps for _, own in sorted(m["teachers"].items())]
        )
    assert len(found[0]) > 12
    assert found[1] == pytest.approx(found[0], rel=1e-3)
