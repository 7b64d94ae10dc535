"""The suites' own cases, tiny, and what the command line writes."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli
from bench.cases import e2e, loss, ring, ring_cuda
from bench.cases.loss_case import CE_PROVIDERS, ce_case
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


@pytest.mark.parametrize("rehearse", [False, True])
def test_the_goals_have_their_cases_on_a_gpu(rehearse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1" if rehearse else "0")
    names = shape_names(rehearse=rehearse)
    found = {
        "loss": [case.name for case in loss.cases(device="cpu" if rehearse else "cuda", quick=False)],
        "ring": [case.name for case in ring.cases(device="cuda", quick=False)],
        "e2e": [case.name for case in e2e.cases(device="cuda", quick=True)],
    }
    for goal in json.loads(GOALS.read_text()):
        patterns = [goal[key].format_map(names) for key in ("case", "other_case") if key in goal]
        assert all(fnmatch.filter(found[goal["suite"]], pattern) for pattern in patterns), goal


def test_cross_entropy_needs_no_teacher() -> None:
    providers = tuple(p for p in CE_PROVIDERS if p.name in ("kdflow", "eager"))
    case = ce_case(loss.Shape(16, 96, 8, 12), "fp32", "cpu", providers)
    assert case.work == 6 * 16 * 96 * 8
    case = replace(case, params={**case.params, "backend": "auto"})
    rows = {row.provider: row for row in run_case(case, Settings(reps=1), say=lambda text: None)}
    assert {name: row.status for name, row in rows.items()} == dict.fromkeys(("3 GEMMs", "kdflow", "eager"), "ok"), rows
    for name, value in rows["eager"].check.items():
        assert rows["kdflow"].check[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_sweep_has_lines_over_rows_vocabulary_and_hidden_size(device: str) -> None:
    cases = loss.cases(device=device, quick=False, sweep=True)
    first = cases[0].params
    for name in ("num_rows", "vocab_size", "student_hidden"):
        line = [case for case in cases if {**case.params, name: 0} == {**first, name: 0}]
        assert len({case.params[name] for case in line}) >= 3
        assert {case.providers[1].name for case in line} == {"kdflow"}


def test_rows_are_packed_alike_by_every_way() -> None:
    case = next(case for case in ring.cases(device="cuda", quick=True) if case.providers == ring_cuda.PACKING)
    params = {"num_rows": 6, "hidden_size": 40, "num_messages": 3, "num_slots": 2, "device": "cpu"}
    interpreted = tuple(replace(provider, env=(("TRITON_INTERPRET", "1"),)) for provider in case.providers)
    rows = run_case(replace(case, providers=interpreted, params=params), Settings(reps=1), say=lambda text: None)
    assert [row.status for row in rows] == ["ok"] * len(rows), rows
    checks = [row.check for row in rows if row.check]
    assert len(checks) == 3
    assert checks == [checks[0]] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["loss", "--shapes", "1,2"], "expected N,V,Hs,Ht"),
        (["loss", "--shapes", "0,1,2,3"], "expected N,V,Hs,Ht"),
        (["loss", "--sweep", "--quick"], "--sweep: has shapes of its own"),
        (["loss", "--quick", "--providers", "kdflow", "nobody"], "no case has ['nobody']"),
        (["ring", "--cases", "nothing"], "no name contains 'nothing'"),
        (["compare", "absent.jsonl", "absent.jsonl"], "absent.jsonl"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
