"""The harness end to end, in real worker processes."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from bench.client import WorkerClient
from bench.environment import environment
from bench.memory import process_tree
from bench.model import Case, Provider, Role, Row
from bench.output import read_results, write_results
from bench.sweep import Settings, run_case, run_cases

CASES = "tests.bench.cases"


def provider(function: str, role: Role = "peer", module: str = CASES) -> Provider:
    return Provider(function, f"{module}:{function}", role)


def case(*providers: Provider, **fields: object) -> Case:
    values = {"work": 1000.0, "unit": "byte", "measures_memory": False, **fields}
    return Case("harness", "a case", {"seconds": 0.02}, providers, **values)  # type: ignore[arg-type]


def run(of: Case, *, reps: int = 3, budget_s: float = 5.0) -> dict[str, Row]:
    rows = run_case(of, Settings(reps=reps, budget_s=budget_s), say=lambda text: None)
    assert [row.provider for row in rows] == [p.name for p in of.providers]
    return {row.provider: row for row in rows}


def test_rows_carry_times_rate_and_percent_of_the_floor() -> None:
    rows = run(case(provider("sleeps", "floor"), provider("sleeps_twice_as_long")))
    floor, slower = rows["sleeps"], rows["sleeps_twice_as_long"]
    assert len(floor.seconds) == 3
    assert floor.median_s is not None
    assert slower.median_s is not None
    assert floor.p20_s <= floor.median_s <= floor.p80_s  # type: ignore[operator]
    assert floor.rate == pytest.approx(1000.0 / floor.median_s)
    assert (floor.floor_percent, slower.floor) == (100.0, "sleeps")
    assert slower.floor_percent == pytest.approx(100 * floor.median_s / slower.median_s)
    assert 25 < slower.floor_percent < 100
    assert floor.check == {"answer": 42.0}
    assert floor.note == "sleeper"


def test_a_provider_that_fails_loses_its_row_alone() -> None:
    rows = run(
        case(
            provider("sleeps"),
            provider("unavailable"),
            provider("absent", module="no_such_package.at_all"),
            provider("prints_and_raises"),
            provider("dies"),
        )
    )
    assert {name: row.status for name, row in rows.items()} == {
        "sleeps": "ok",
        "unavailable": "unavailable",
        "absent": "unavailable",
        "prints_and_raises": "failed",
        "dies": "failed",
    }
    assert "next year" in rows["unavailable"].note
    assert "no_such_package" in rows["absent"].note
    assert rows["prints_and_raises"].note == "RuntimeError: cannot read weights.bin"  # no folders
    assert "died in step (7)" in rows["dies"].note
    assert rows["dies"].median_s is None


def test_a_provider_over_its_time_is_cut() -> None:
    rows = run(case(provider("hangs"), provider("sleeps"), warm_up_timeout_s=0.3), budget_s=0.2)
    assert rows["hangs"].status == "cut"
    assert "step took longer than" in rows["hangs"].note
    assert rows["sleeps"].status == "ok"


def test_the_budget_bounds_the_repetitions() -> None:
    rows = run(case(provider("sleeps")), reps=1000, budget_s=0.2)
    assert 1 <= len(rows["sleeps"].seconds) <= 11


def test_a_step_may_measure_itself() -> None:
    row = run(case(provider("measures_itself"), warm_up=False))["measures_itself"]
    assert row.status == "ok"
    assert (row.median_s, row.work, row.peak_mib) == (0.5, 100.0, 3.0)
    assert row.metrics == {"p99_us": 7.0}
    assert len(row.seconds) == 3  # without a warm-up the first one counts


def test_peak_memory_is_what_the_step_touches_above_inputs_and_gradients() -> None:
    row = run(case(provider("touches_memory"), measures_memory=True))["touches_memory"]
    assert row.peak_mib == pytest.approx(64 - 16, abs=4)
    assert row.kept_mib == pytest.approx(8, abs=4)


def test_providers_that_do_not_fit_together_run_in_groups() -> None:
    names = ("sleeps", "sleeps_twice_as_long", "measures_itself")
    rows = run(case(provider(names[0], "floor"), *map(provider, names[1:]), worker_mib=1e9))
    assert all(rows[name].status == "ok" and rows[name].floor == "sleeps" for name in names)


def test_a_provider_apart_starts_when_the_others_have_gone() -> None:
    apart = replace(provider("sleeps_twice_as_long"), apart=True)
    said: list[str] = []
    rows = run_case(
        case(provider("sleeps", "floor"), apart, provider("unavailable")), Settings(reps=1), say=said.append
    )
    assert [text for text in said if "starting" in text] == [
        "a case: starting sleeps, unavailable",
        "a case: starting sleeps, sleeps_twice_as_long",
    ]
    assert [row.provider for row in rows] == ["sleeps", "sleeps_twice_as_long", "unavailable"]
    assert rows[1].floor_percent is not None


def test_cases_of_a_pool_share_their_processes() -> None:
    first = case(provider("tells_its_process"), provider("dies"), worker_pool="a")
    second = replace(first, params={"seconds": 0.5})
    other, alone = replace(first, worker_pool="b"), replace(first, worker_pool="")
    told = [rows[0] for rows in run_cases([first, second, other, alone, alone], Settings(reps=1))]
    assert [row.status for row in told] == ["ok"] * 5
    assert [row.note for row in told[:2]] == ["0.02", "0.5"]  # set up anew
    pids = [row.check["pid"] for row in told]
    assert pids[0] == pids[1]
    assert len(set(pids)) == 4
    assert all(not Path(f"/proc/{int(pid)}").exists() for pid in pids)


def test_closing_a_worker_ends_what_it_started() -> None:
    client = WorkerClient(provider("sleeps"), num_threads=1)
    pid = client._process.pid
    client.ask("setup", timeout_s=30, entry=f"{CASES}:sleeps", params={"seconds": 0.0})
    assert pid in process_tree(os.getpid())
    client.close()
    client.close()
    assert pid not in process_tree(os.getpid())


def test_results_survive_the_file(tmp_path: Path) -> None:
    rows = list(run(case(provider("sleeps", "floor"), provider("unavailable"))).values())
    machine = environment(device="cpu", num_threads=1)
    path = tmp_path / "run.jsonl"
    write_results(path, machine, rows)
    assert read_results(path) == (machine, rows)
    kinds = [json.loads(line)["kind"] for line in path.read_text().splitlines()]
    assert kinds == ["environment", "row", "row"]
    hostname = subprocess.run(["uname", "-n"], capture_output=True, text=True, check=True).stdout.strip()
    for private in (hostname, str(Path.cwd()), str(Path.home()) + "/"):
        assert private not in path.read_text()


def test_reading_something_else_says_what_was_expected(tmp_path: Path) -> None:
    path = tmp_path / "notes.jsonl"
    path.write_text("hello\n")
    with pytest.raises(ValueError, match=r"expected a JSON object a line.*got 'hello'"):
        read_results(path)
    path.write_text('{"kind": "row"}\n')
    with pytest.raises(ValueError, match="first line is the environment"):
        read_results(path)
