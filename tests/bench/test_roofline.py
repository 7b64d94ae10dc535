"""``bench roofline``: the stored CPU run on paper, and rates measured here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench import cli, roofline
from bench.client import ROOT
from bench.output import RESULTS, read_results
from kdflow.errors import ConfigError
from kdflow.modeling import load_model_config
from kdflow.plan import Rates
from kdflow.plan.plan import WARM_UP_STEPS

STORED = RESULTS / "e2e-amx.jsonl"
# What `bench ceilings` measured where that run was made; the rate of products is the run's own.
RATES = Rates("a CPU", "the test", 1e12, 5.6e10, 2.2e10, 3.5e10, 2.6e8, 1e10, 1e10, 1e10, 2e10, 2e8, shared=True)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    try:
        load_model_config("~/.cache/kdflow/smollm2-135m-instruct-10-layers")
    except ConfigError:
        pytest.skip("the quickstart's models are not prepared")


def test_the_stored_run_is_predicted(models: None) -> None:
    plan, errors = roofline.compare_with(STORED, RATES)
    found = {error.name.split(",")[0].split(" ")[0]: error for error in errors}
    ours = next(row for row in read_results(STORED)[1] if row.role == "ours")
    assert (
        sum(p.num_tokens for step in plan.workload.steps[WARM_UP_STEPS:] for ranks in step for p in ranks) == ours.work
    )
    assert ours.median_s is not None
    assert found["tokens/s"].measured == pytest.approx(ours.work / ours.median_s, rel=1e-3)
    assert abs(found["peak"].percent) < 25
    assert abs(found["tokens/s"].percent) < 25
    slow, _ = roofline.compare_with(STORED, replace(RATES, operator_bytes=1.1e10, loss_logits=1.3e8))
    assert slow.tokens_per_s < plan.tokens_per_s


def test_bad_files(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    results = RESULTS / "gpu-h100-loss.jsonl"
    assert cli.main(["roofline", "--rates", "H100", "--against", str(results)]) == 2
    assert "expected a finished `bench e2e` run" in capsys.readouterr().err
    assert cli.main(["roofline", "--rates", "H1000"]) == 2
    assert 'did you mean "H100"' in capsys.readouterr().err
