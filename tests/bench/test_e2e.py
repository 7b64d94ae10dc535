"""The GPU's end-to-end case with tiny models on the CPU: all providers do the same job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases.e2e import gpu_case
from bench.cases.e2e_shapes import QWEN3
from bench.sweep import Settings, run_case

TEACHER = {
    **QWEN3,
    "vocab_size": 5000,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "num_attention_heads": 4,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
}


def test_providers_come_to_the_same_losses(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    options = [
        "--training.samples_per_step=4",
        "--data.max_length=256",
        *("--teacher.dtype=float32", "--student.compute_dtype=float32"),
    ]
    models = {"teacher": TEACHER, "student": {**TEACHER, "hidden_size": 32}}
    case = gpu_case("cpu", quick=True, models=models, overrides=options)
    case = replace(case, providers=tuple(p for p in case.providers if "trl" not in p.name))
    rows = {row.provider: row for row in run_case(case, Settings(reps=1), say=lambda text: None)}
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(rows, "ok"), rows
    ours, eager = rows["kdflow train"], rows["eager loop"]
    for name in ("first_loss", "last_loss"):
        assert ours.metrics[name] == pytest.approx(eager.metrics[name], rel=1e-3)
    assert ours.metrics["last_loss"] < ours.metrics["first_loss"]
    assert ours.work == eager.work == rows["GEMMs of the step"].work > 0
    assert 0 <= ours.metrics["wait_share"] < 1
