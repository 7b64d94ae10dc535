"""``bench gpu``: its rehearsal, its verdict, and that no part hides another one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench import cli
from bench.client import ROOT
from bench.gpu import parts, process, verdict
from bench.model import Case, Provider, Role, Row
from bench.output import read_results
from bench.sweep import Settings, _packed, run_case

NAMES = {"main": "N=8 V=16 Hs=4 Ht=4", "wide": "N=8 V=16 Hs=4 Ht=8"}


def test_it_starts_where_only_libraries_are_installed() -> None:
    environment = {"PYTHONPATH": sysconfig.get_path("purelib"), "PATH": os.environ["PATH"]}  # whose .pth are not read
    command = [sys.executable, "-S", "-m", "bench", "gpu", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "--rehearse" in result.stdout


def row(case: str, provider: str, seconds: float, role: Role = "peer", **fields: object) -> Row:
    values = {"floor": "4 GEMMs", "floor_percent": 100 / seconds, **fields}
    return Row("loss", f"{case} bf16 {NAMES['main']}", {}, provider, role, "ok", median_s=seconds, **values)  # type: ignore[arg-type]


BESIDE = {
    "kdflow, forward_kl": (1.0, 2.0, 1.1, 3.0),
    "kdflow, jsd": (1.1, 2.2, 1.21, 1.0),
    "kdflow, clusters, forward_kl": (1.0, 2.0, 3.0),
    "kdflow, clusters, jsd": (1.0, 2.0),
}


def beside(provider: str, seconds: tuple[float, ...]) -> Row:
    made = row("jsd", provider, 1.0, "ours")
    return replace(made, seconds=seconds, case=f"jsd beside forward_kl, bf16, {NAMES['main']}")


def judged(rows: Sequence[Row]) -> dict[str, verdict.Finding]:
    return {finding.goal: finding for finding in verdict.judge(rows, NAMES)}


def test_every_goal_is_measured_or_says_why_not() -> None:
    found = judged(
        [
            replace(row("grad_filter_eps", "kdflow, exact", 1.5, "ours"), case="grad_filter_eps bf16, a model"),
            replace(row("grad_filter_eps", "kdflow, eps 2e-4", 0.9, "ours"), case="grad_filter_eps bf16, a model"),
            row("forward_kl", "kdflow", 1.1, "ours", peak_mib=700.0, check={"loss": 1.0}),
            row("forward_kl", "trl", 1.3, check={"loss": 1.05}),
            row("jsd", "kdflow", 1.15, "ours", peak_mib=1100.0, check={"loss": 2.0}),
            row("jsd", "trl", 2.3, check={"loss": 2.0}),
            replace(row("jsd", "liger fused", 1.0), status="failed", median_s=None, floor_percent=None, note="OOM"),
            *(beside(name, seconds) for name, seconds in BESIDE.items()),
            replace(
                row("forward_kl", "kdflow, clusters", 1.0, "ours", floor_percent=None),
                status="failed",
                median_s=None,
                note="illegal",
            ),
        ]
    )
    assert len(found) == len(json.loads(verdict.GOALS.read_text()))
    verdicts = {goal: (finding.verdict, finding.measured) for goal, finding in found.items()}
    assert verdicts["loss, forward KL: share of the GEMM floor, %"] == ("pass", pytest.approx(90.9, abs=0.1))
    assert verdicts["loss, forward KL: times as fast as TRL"] == ("fail", pytest.approx(1.18, abs=0.01))
    assert verdicts["loss, JSD: times as fast as TRL"] == ("pass", pytest.approx(2.0))
    assert verdicts["loss: peak above inputs and gradients, MiB"] == ("fail", 1100.0)  # the worst of both
    # Of each round, whatever the clocks do in between: the ratio of the medians is 1.
    assert verdicts["loss: time of JSD over forward KL"] == ("fail", pytest.approx(1.1))
    assert verdicts["loss in clusters: time of JSD over forward KL"] == ("pass", pytest.approx(1.0))
    assert verdicts["loss, filter on a real model's hidden states: share of the dense floor, %"] == (
        "pass",
        pytest.approx(111.1, abs=0.1),
    )
    failed = found["loss in clusters, forward KL: share of the GEMM floor, %"]  # not hidden by the other kernel's row
    assert (failed.verdict, failed.note) == ("not measured", "kdflow, clusters: failed: illegal")
    missing = found["loss, JSD: times as fast as Liger's fused JSD"]
    assert missing.verdict == "not measured"
    assert missing.note == "liger fused: failed: OOM"
    off = next(finding for goal, finding in found.items() if "deviation" in goal)
    assert (off.verdict, off.measured) == ("fail", pytest.approx(100 * 0.05 / 1.05))
    assert found["main job: student tokens/s"].note == "no such case in this run"


def test_a_rehearsal_writes_rows_parts_verdict_and_a_page(tmp_path: Path) -> None:
    stem = tmp_path / "gpu"
    arguments = ["gpu", "--rehearse", "--budget", "240", "--parts", "versions,build,ceilings", "--out", str(stem)]
    assert cli.main(arguments) == 0
    machine, rows = read_results(Path(f"{stem}.jsonl"))
    assert {name: part["status"] for name, part in machine["parts"].items()} == dict.fromkeys(
        ("versions", "build", "ceilings"), "ok"
    )
    assert machine["parts"]["versions"]["packages"]["torch"]
    assert {row.suite for row in rows} == {"ceilings"}
    assert all(row.median_s for row in rows)
    assert {goal["verdict"] for goal in machine["verdict"]} == {"not measured"}
    assert "not measured" in Path(f"{stem}.html").read_text()
    assert "bench ceilings" in Path(f"{stem}.log").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.html", "gpu.jsonl", "gpu.log", "gpu.png"]


def test_a_part_without_time_or_with_an_error_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: object) -> parts.Result:
        raise OSError("no space left")

    known = parts.parts(rehearse=True)
    chosen = [replace(known[0], name="broken", run=raises), replace(known[1], name="build")]
    monkeypatch.setattr("bench.gpu.command.parts", lambda rehearse: chosen)
    out = tmp_path / "gpu"
    assert cli.main(["gpu", "--rehearse", "--parts", "broken,build", "--out", str(out)]) == 1
    found = read_results(Path(f"{out}.jsonl"))[0]["parts"]
    assert found["broken"] == {"status": "failed", "note": "OSError: no space left"}
    assert found["build"]["status"] == "ok"
    assert cli.main(["gpu", "--rehearse", "--parts", "build", "--budget", "1", "--out", str(out)]) == 1
    assert read_results(Path(f"{out}.jsonl"))[0]["parts"]["build"]["note"] == "not begun: no time was left"


def test_outcomes_of_tests_survive_a_cut_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "import time, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 + 1 == 3\n"
        "@pytest.mark.skip(reason='no GPU')\n"
        "def test_skipped(): pass\n"
        "def test_slow(): time.sleep(600)\n"
    )
    record = tmp_path / "record.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-p", "bench.gpu.recorder"]
    env = {**os.environ, "PYTHONPATH": str(parts.ROOT), "BENCH_TEST_RECORD": str(record)}
    with (tmp_path / "log").open("wb") as log:
        code = process.run([*command, str(tmp_path)], env=env, log=log, timeout_s=15)
    assert code is None
    found = parts._tests_found(record, code)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert not found["complete"]
    assert found["note"] == "cut: its time ran out"
    assert "test_bad" in found["failures"][0]


def test_a_command_over_its_time_is_ended_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']);"
        "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(600)"
    )
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-c", code, str(pid_file)]
        assert process.run(command, env=dict(os.environ), log=log, timeout_s=3) is None
    child = int(pid_file.read_text())
    for _ in range(100):  # killed, and reaped by whoever adopted it
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail(f"process {child} still lives")


def test_providers_are_packed_by_the_memory_of_the_device() -> None:
    sizes = {"a": 10.0, "b": 10.0, "c": 25.0, "d": 90.0, "e": 5.0}
    providers = [Provider(name, "module:function", device_mib=mib) for name, mib in sizes.items()]
    groups = _packed(providers, 40.0)
    assert [[provider.name for provider in group] for group in groups] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_nothing_begins_after_the_deadline() -> None:
    case = Case("harness", "late", {}, (Provider("p", "no_such_module:function"),), 1.0, "byte")
    (found,) = run_case(case, Settings(deadline=time.monotonic()), say=lambda text: None)
    assert (found.status, found.note) == ("cut", "not begun before the run's deadline")


def test_every_test_for_a_gpu_is_found() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-qq", "-p", "no:cacheprovider", "tests"]
    listed = subprocess.run(command, cwd=parts.ROOT, capture_output=True, text=True, timeout=200, check=True).stdout
    # A line for each file: its name and how many.
    collected = {line.partition(":")[0] for line in listed.splitlines() if line.startswith("tests/")}
    found = parts.marked_files("gpu")
    assert len(collected) >= 6
    assert collected == set(found)
    assert {parts.ALONE, *parts.FIRST, *parts.LAST} <= {*found, *parts.marked_files("any_device")}


def test_bad_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu", "--parts", "loss,speed"]) == 2
    assert "unknown ['speed']" in capsys.readouterr().err
