"""``bench.tune``: its parts on devices that are not there, what becomes of one that fails, and what it calls wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from bench.client import ROOT
from bench.gpu.parts import Setting
from bench.tune import clusters, command, measure
from bench.tune.command import PARTS, Part, run_all
from bench.tune.phases import BOUND_BY, PHASES, Found
from kdflow_kernels import nvrtc
from kdflow_kernels.problem import RowTerms
from support import fake_gpu

NO_FAKE_DEVICES = pytest.mark.skipif(
    torch.version.cuda is not None or not torch.__version__.startswith("2.13."),
    reason="stands in for parts of a CPU build of torch 2.13",
)


@NO_FAKE_DEVICES
@pytest.mark.timeout(400)
def test_its_parts_run_on_fake_devices(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every line but those of CUDA's own operators and graphs."""
    pytest.importorskip("triton")
    if (reason := nvrtc.unavailable()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with FileLock(str(folder / "fake-gpu.lock")):
        devices = fake_gpu.build(folder / "fake-gpu")
    out = tmp_path / "tune.jsonl"
    paths = [devices["PYTHONPATH"], *(str(ROOT / name) for name in ("tests", "kernels")), str(ROOT)]
    env = {**os.environ, **devices, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    script = ROOT / "tests/support/cluster_rows/rehearse_tune.py"
    parts = "gemms,clusters:jsd,clusters:circumstances,rows"
    options = ["--here", "--shape", "8,1003,32,16", "--parts", parts, "--out", str(out)]
    done = subprocess.run(
        [sys.executable, str(script), *options], env=env, cwd=ROOT, capture_output=True, text=True, timeout=380
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = [json.loads(text) for text in out.read_text().splitlines()]
    assert records[0]["part"] == "machine"
    words = [record["words"] for record in records if "words" in record]
    assert not [text for text in words if "WRONG" in text]
    # The first form, another cut, another number of rows, another policy: each beside Triton's, repeated, with a clock.
    assert sum(text.startswith("against Triton's") for text in words) == 4
    assert sum(text == "0 of 2 launches differ from the first one" for text in words) == 4
    cycles = [record["cycles"] for record in records if "cycles" in record]
    assert len(cycles) == 4
    assert all(set(found) == set(PHASES) and sum(found.values()) > 0 for found in cycles)
    names = [record["name"] for record in records if record["part"] == "rows"]
    assert sum(name.endswith("with a clock") for name in names) == 4
    assert sum("kept" in name for name in names) == 4
    assert [record["name"] for record in records if record["part"] == "loss"] == ["rows in clusters jsd"]
    failed = {record["name"] for record in records if "Error" in record.get("words", "")}
    of_products = {name for name in failed if "into fp32" in name}
    assert failed - of_products == {"graph", "loaded in a capture"}


def test_a_part_that_fails_or_hangs_leaves_the_rest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = {
        "good": "print('a line')",
        "hangs": "import time; print('before', flush=True); time.sleep(600)",
        "faults": "import os; os.abort()",
        "last": "print('the last')",
    }
    chosen = [Part(name, 1.0, lambda s: None) for name in code]
    begun = time.monotonic()
    with (tmp_path / "log").open("wb") as log:
        setting = Setting("cuda", quick=False, rehearse=False, folder=tmp_path, log=log)
        assert run_all(chosen, setting, 28.0, lambda part: [sys.executable, "-c", code[part.name]]) == 1
    assert time.monotonic() - begun < 28
    printed = [text.partition(" in ")[0] for text in capfd.readouterr().out.splitlines()]
    assert printed == ["good: ok", "hangs: cut: its time ran out", "faults: ended with -6", "last: ok"]
    lines = (tmp_path / "log").read_text().splitlines()
    assert [text for text in lines if text in ("a line", "before", "the last")] == ["a line", "before", "the last"]


def test_a_line_that_waits_for_ever_ends_its_part() -> None:
    code = (
        "import time; from bench.tune import measure; measure.LINE_S = 1.0\n"
        "with measure.line('rows', 'first'): print('done', flush=True)\n"
        "with measure.line('rows', 'second'): time.sleep(600)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "done\n")
    assert "Timeout (0:00:01)!" in done.stderr


def test_an_error_is_a_line_unless_the_device_is_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with measure.line("rows", "a cut"):
        raise RuntimeError("cuFuncSetAttribute(8, 300000): invalid value (1)")
    assert capfd.readouterr().out == "rows     a cut: RuntimeError: cuFuncSetAttribute(8, 300000): invalid value (1)\n"

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(SystemExit) as ended, measure.line("rows", "a cut"):
        raise RuntimeError("launch failed")
    assert ended.value.code == measure.LOST
    assert "nothing can run in this process any more: an illegal memory access" in capfd.readouterr().out


class TwoKernels:
    """In the place of clusters.Rows: theirs and ours, other in one place."""

    def __init__(self, place: tuple[int, int] | None, value: float) -> None:
        self.run = SimpleNamespace(columns=8, launcher="ours", _launcher=lambda: "theirs")
        self.out, self.place, self.value = torch.zeros(4, 9), place, value

    def launch(self) -> RowTerms:
        self.out[:] = 1.0
        self.out[:, 8] = -1e30 if self.run.launcher == "theirs" else 0.0  # beyond the columns each writes as it likes
        if self.place is not None and self.run.launcher == "ours":
            self.out[self.place] = self.value
        numbers = torch.ones(4)
        return SimpleNamespace(  # type: ignore[return-value]
            kd=numbers, student_entropy=numbers, teacher_entropy=numbers, top1_agreement=numbers
        )


@pytest.mark.parametrize("value", [1.1, torch.nan, -1e30])
def test_wrong_numbers_are_placed(value: float) -> None:
    assert "WRONG" not in clusters.against_triton(TwoKernels(None, 0.0))  # type: ignore[arg-type]
    assert "WRONG" not in clusters.against_triton(TwoKernels((2, 5), 1.0 + 2**-8))  # type: ignore[arg-type]
    words = clusters.against_triton(TwoKernels((2, 5), value))  # type: ignore[arg-type]
    assert words.endswith("WRONG gradient: 1 of 32, 1 rows 2..2, 1 columns 5..5;")


def test_phases_are_shares_of_a_row() -> None:
    assert sorted(name for group in BOUND_BY.values() for name in group) == sorted(PHASES)
    found = Found({**dict.fromkeys(PHASES, 0.0), "copies": 600.0, "cluster": 100.0, "gradient": 300.0}, 1.25)
    assert str(found) == (
        "memory 60%, barriers 10%, arithmetic 30% of 1,000 cycles a row "
        "(copies 60.0%, cluster 10.0%, gradient 30.0%); slowest block 1.25 of the mean"
    )


def test_parts_by_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[str] = []
    monkeypatch.setattr(command, "run_all", lambda chosen, *_: asked.extend(part.name for part in chosen) or 0)
    assert command.main([]) == 0
    assert asked == [part.name for part in PARTS if part.name != "layouts"]
    asked.clear()
    assert command.main(["--parts", "loss,clusters:jsd"]) == 0
    assert asked == ["clusters:jsd", "loss"]
    with pytest.raises(SystemExit):
        command.main(["--parts", "speed"])
    assert "unknown ['speed']" in capsys.readouterr().err
