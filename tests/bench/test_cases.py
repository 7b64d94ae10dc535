"""The suites' own cases, tiny, and what the command line writes."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli
from bench.cases import e2e, loss, ring, ring_cuda
from bench.gpu.parts import shape_names
from bench.gpu.verdict import GOALS
from bench.output import read_results
from bench.sweep import Settings, run_case

TINY = "16,96,8,12"


def test_loss_providers_agree_and_the_report_is_self_contained(tmp_path: Path) -> None:
    out = tmp_path / "tiny.jsonl"
    arguments = ["loss", "--shapes", TINY, "--divergence", "forward_kl", "--dtype", "fp32"]
    options = ["--providers", "kdflow", "eager", "--reps", "2", "--threads", "1", "--out", str(out)]
    assert cli.main([*arguments, *options]) == 0
    _, rows = read_results(out)
    by_name = {row.provider: row for row in rows}
    assert by_name.keys() == {"4 GEMMs", "kdflow", "eager"}
    assert all(row.status == "ok" and len(row.seconds) == 2 for row in rows)
    ours, eager = by_name["kdflow"].check, by_name["eager"].check
    assert ours.keys() == eager.keys() == {"loss", "norm_dH", "norm_dW"}
    for name, value in eager.items():
        assert ours[name] == pytest.approx(value, rel=1e-4)
    page = out.with_suffix(".html").read_text()
    assert "data:image/png;base64," in page
    assert "://" not in page  # nothing is fetched; base64 has no colon
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_ring_counts_every_message_and_measures_latency() -> None:
    throughput, latency, *_ = ring.cases(quick=True, sizes=[65536])
    assert throughput.work == throughput.params["num_messages"] * 65536
    params = {**latency.params, "num_messages": 50}
    for case in (
        replace(throughput, providers=(ring.OURS, ring.QUEUES[0])),
        replace(latency, providers=(ring.OURS,), params=params),
    ):
        rows = run_case(case, Settings(reps=1), say=lambda text: None)
        assert [row.status for row in rows] == ["ok"] * len(case.providers), rows
    assert 0 < rows[0].metrics["p50_us"] <= rows[0].metrics["p99_us"]


def test_cases_are_json_and_named_once() -> None:
    cases = [
        *loss.cases(device="cpu", quick=False),
        *loss.cases(device="cuda", quick=False),
        *ring.cases(quick=False),
        *ring.cases(device="cuda", quick=False),
        *e2e.cases(device="cpu", quick=False),
    ]
    assert len({(case.suite, case.name) for case in cases}) == len(cases)
    for case in cases:
        assert json.loads(json.dumps(dict(case.params))) == dict(case.params)
        assert any(provider.role == "ours" for provider in case.providers)
        assert len({provider.name for provider in case.providers}) == len(case.providers)


def test_rows_are_packed_alike_by_every_way() -> None:
    case = next(case for case in ring.cases(device="cuda", quick=True) if case.providers == ring_cuda.PACKING)
    params = {"num_rows": 6, "hidden_size": 40, "num_messages": 3, "num_slots": 2, "device": "cpu"}
    interpreted = tuple(replace(provider, env=(("TRITON_INTERPRET", "1"),)) for provider in case.providers)
    rows = run_case(replace(case, providers=interpreted, params=params), Settings(reps=1), say=lambda text: None)
    assert [row.status for row in rows] == ["ok"] * len(rows), rows
    checks = [row.check for row in rows if row.check]
    assert len(checks) == 3
    assert checks == [checks[0]] * 3


def test_the_goals_have_their_cases_on_a_gpu() -> None:
    names = shape_names(rehearse=False)
    suites = {suite.__name__.rpartition(".")[2]: suite.cases(device="cuda", quick=False) for suite in (loss, ring)}
    for goal in json.loads(GOALS.read_text()):
        if (cases := suites.get(goal["suite"])) is not None:
            patterns = [goal[key].format_map(names) for key in ("case", "other_case") if key in goal]
            assert all(fnmatch.filter([case.name for case in cases], pattern) for pattern in patterns), goal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss", "--shapes", "1,2"], "expected N,V,Hs,Ht"),
        (["loss", "--quick", "--providers", "nobody"], "none of ['nobody'] is in"),
        (["ring", "--cases", "nothing"], "no name contains 'nothing'"),
        (["compare", "absent.jsonl", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
