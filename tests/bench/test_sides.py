"""``bench teacher`` and ``bench student`` with tiny models: every way does the same job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.cases import student, teacher
from bench.model import Case
from bench.sweep import Settings, run_case
from tests.bench.test_e2e import TEACHER


@pytest.mark.parametrize(("suite", "agreed", "tolerance"), [(teacher, "mean_row", 1e-3), (student, "first_loss", 1e-3)])
def test_providers_agree(suite, agreed: str, tolerance: float, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (case,) = suite.cases(device="cpu", quick=True)
    options = ["--training.samples_per_step=4", "--data.max_length=256", "--training.tokens_per_microbatch=512"]
    params = {
        **case.params,
        "config": "bench/cases/e2e_gpu.yaml",
        "models": {"teacher": TEACHER, "student": {**TEACHER, "hidden_size": 32}},
        "num_measured_steps": 2,
        "overrides": [*options, "--teacher.dtype=float32", "--student.compute_dtype=float32"],
    }
    rows = {row.provider: row for row in run_case(replace(case, params=params), Settings(reps=2), say=lambda t: None)}
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(rows, "ok"), rows
    floor = next(row for row in rows.values() if row.role == "floor")
    assert abs(floor.check[agreed]) > 1e-4
    for row in rows.values():
        assert row.check[agreed] == pytest.approx(floor.check[agreed], rel=tolerance), row.provider
        assert row.work == floor.work > 0
        assert row.floor_percent is not None


def test_gpus_have_cases_of_their_own() -> None:
    cases: list[Case] = [*teacher.cases(device="cuda", quick=False), *student.cases(device="cuda", quick=False)]
    for case in cases:
        assert case.params["models"]
        assert {p.role for p in case.providers} >= {"ours", "floor"}
    assert any("sglang" in p.name for p in cases[0].providers)
