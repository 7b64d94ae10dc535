"""The bench of what capture costs measures three engines that do the same."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases import teacher
from bench.sweep import Settings, run_case
from support.sglang_engine import needs_sglang

pytestmark = [needs_sglang, pytest.mark.timeout(400)]


def test_all_ways_hand_over_the_same(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    _, case = teacher.cases(device="cpu", quick=False)
    shape = {**case.params["models"]["teacher"], "hidden_size": 128, "intermediate_size": 128, "vocab_size": 4096}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    params = {**case.params, "models": {"teacher": shape}, "num_prompts": 3, "length": 20}
    rows = run_case(replace(case, params=params), Settings(reps=1), say=lambda text: None)
    assert [row.status for row in rows] == ["ok"] * 3, rows
    bare, captured, stock = rows
    assert captured.check["mean_row"] == pytest.approx(stock.check["mean_row"], rel=1e-3)
    assert captured.floor == stock.floor == bare.provider
