"""The parts of ``bench gpu``, each a process of its own: what it runs, and what came of it."""

from __future__ import annotations

import json
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from bench.client import ROOT
from bench.gpu import process
from bench.model import Row
from bench.output import read_results

ALONE, ALONE_SHARE = "tests/transport/test_cuda_gpu.py", 0.6  # of the tests' time at most
TESTS_AT_ONCE = 8
# Of the other files: what the loss's kernels compute first, what compiles or checks for long last.
FIRST = ("tests/kernels/test_triton_backend.py", "tests/kernels/test_cluster_rows.py")
LAST = ("tests/kernels/test_compute_sanitizer.py", "tests/kernels/test_compiled_loss.py")
ENDING_S = 10.0  # what a suite keeps of its time for the end of its run


@dataclass(frozen=True)
class Setting:
    """What all parts share: where they run, and where they write meanwhile."""

    device: str
    quick: bool
    rehearse: bool
    folder: Path
    log: IO[bytes]

    @property
    def env(self) -> dict[str, str]:
        build = ROOT / "build"
        added = {
            # cmake and ninja may be scripts beside the interpreter.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]),
            # In the checkout, since a home may not be writable.
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(build / "triton")),
            "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", str(build / "inductor")),
        }
        if self.rehearse:
            added["TRITON_INTERPRET"] = "1"
        return {**os.environ, **added}


@dataclass(frozen=True)
class Result:
    """``status`` is ok, failed or cut; ``found`` is what the part found besides rows."""

    status: str = "ok"
    note: str = ""
    rows: tuple[Row, ...] = ()
    found: dict[str, Any] = field(default_factory=dict)


Watch = Callable[[Result], None]


@dataclass(frozen=True)
class Part:
    """``seconds`` is what it takes when all goes well; the parts share the time in this ratio."""

    name: str
    seconds: float
    run: Callable[[Setting, float, Watch], Result]


def versions(setting: Setting, limit_s: float, watch: Watch) -> Result:
    """What can be imported. It also brings torch from the disk, which the next parts would wait for."""
    answer = setting.folder / "packages.json"
    status, note = _ended(_run([sys.executable, "-m", "bench.gpu.packages", str(answer)], setting, limit_s))
    packages = json.loads(answer.read_text()) if answer.exists() else {}
    if status == "ok" and not setting.rehearse and "cuda" not in packages:
        return Result("failed", "torch finds no CUDA device here", found={"packages": packages})
    return Result(status, note, found={"packages": packages})


def build(setting: Setting, limit_s: float, watch: Watch) -> Result:
    """The extension, beside its package, unless one newer than its sources can be imported. A
    rehearsal leaves alone what is there: others may be using it."""
    check = [sys.executable, "-c", "import kdflow._ring"]
    built = ROOT / "kdflow" / f"_ring{sysconfig.get_config_var('EXT_SUFFIX')}"
    if built.exists() and _run(check, setting, limit_s) == 0:
        sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
        if setting.rehearse or built.stat().st_mtime > max(path.stat().st_mtime for path in sources):
            return Result(note="there already, not built again")
    start = time.monotonic()
    status, note = _ended(_run([sys.executable, "setup.py", "build_ext", "--inplace"], setting, limit_s))
    if status == "ok" and _run(check, setting, limit_s) != 0:
        return Result("failed", "built, but it cannot be imported; see the log")
    return Result(status, note or f"built in {time.monotonic() - start:.0f} s")


def marked_files(marker: str) -> list[str]:
    """The test files in which the marker stands, in the order in which they are run."""
    found = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(rf"\bpytest\.mark\.{marker}\b", path.read_text())
    ]
    return sorted(found, key=lambda file: (file not in FIRST, file in LAST))


def tests(setting: Setting, limit_s: float, watch: Watch) -> Result:
    """The tests marked ``gpu``, a process for each file: those of the rings first and alone, since they watch the
    memory of the whole device, then the others side by side, since most of their time is start and compilation; at last
    what runs on any device."""
    found: dict[str, Any] = {}
    begin = time.monotonic()

    def run(job: tuple[str, str]) -> None:
        file, marker = job
        name = file if marker == "gpu" else f"{file}, {marker}"
        record = setting.folder / f"{name.replace('/', '-')}.jsonl"
        command = [sys.executable, "-m", "pytest", "-m", marker, "-n0", "--tb=short", "-p", "bench.gpu.recorder"]
        env = {"BENCH_TEST_RECORD": str(record), "OMP_NUM_THREADS": "2"}
        with tempfile.TemporaryFile() as log:
            left = limit_s * (ALONE_SHARE if file == ALONE else 1.0) - (time.monotonic() - begin)
            code = _run([*command, file], replace(setting, log=log), left, env) if left > 1 else None
            log.seek(0)
            setting.log.write(log.read())
            setting.log.flush()
        found[name] = _tests_found(record, code)

    others = [(file, "gpu") for file in marked_files("gpu") if file != ALONE]
    others += [(file, "any_device and not gpu") for file in marked_files("any_device")]
    for wave in ([(ALONE, "gpu")], others):
        with ThreadPoolExecutor(TESTS_AT_ONCE) as executor:
            for _ in executor.map(run, wave):
                watch(Result("cut", "under way", found={"tests": dict(found)}))
    bad = [name for name, counts in found.items() if not counts["complete"]]
    return Result("failed" if bad else "ok", f"see {', '.join(bad)}" if bad else "", found={"tests": found})


def _tests_found(record: Path, code: int | None) -> dict[str, Any]:
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    outcomes = [line["outcome"] for line in lines]
    # 5 is pytest's code for "nothing collected", which the marker alone may be the reason of.
    note = {None: "cut: its time ran out", 5: "no test is marked gpu"}.get(code, "")
    if not note and code not in (0, 1):
        note = f"pytest ended with {code}; see the log"
    return {
        **{name: outcomes.count(name) for name in ("passed", "failed", "skipped")},
        "complete": code in (0, 5) and "failed" not in outcomes,
        "note": note,
        "failures": [f"{line['test']}: {line['message']}" for line in lines if line["outcome"] == "failed"],
    }


def suite(name: str, *arguments: str) -> Callable[[Setting, float, Watch], Result]:
    """A suite of ``python -m bench``, whose rows are handed on as they come."""

    def run(setting: Setting, limit_s: float, watch: Watch) -> Result:
        path = Path(tempfile.mkdtemp(dir=setting.folder)) / f"{name}.jsonl"
        command = [sys.executable, "-m", "bench", name, "--device", setting.device, "--out", str(path)]
        command += ["--deadline-s", f"{max(1.0, limit_s - ENDING_S):.0f}", *arguments]
        if setting.quick and "--quick" not in arguments:
            command.append("--quick")
        code = _run(command, setting, limit_s, watch=lambda: watch(Result("cut", "under way", _rows(path))))
        status, note = _ended(code)
        rows = _rows(path)
        ours = [row for row in rows if row.role == "ours"]
        if status == "ok" and ours and not any(row.median_s for row in ours):
            return Result("failed", f"{ours[0].provider}: {ours[0].status}: {ours[0].note}"[:300], rows)
        late = sum(row.status == "cut" for row in rows)
        if status == "ok" and late:
            return Result("cut", f"{late} of {len(rows)} rows ran out of time", rows)
        return Result(status, note, rows)

    return run


def _rows(path: Path) -> tuple[Row, ...]:
    return tuple(read_results(path)[1]) if path.exists() else ()


def _run(
    command: Sequence[str],
    setting: Setting,
    limit_s: float,
    env: dict[str, str] | None = None,
    watch: Callable[[], None] = lambda: None,
) -> int | None:
    return process.run(command, env={**setting.env, **(env or {})}, log=setting.log, timeout_s=limit_s, watch=watch)


def _ended(code: int | None) -> tuple[str, str]:
    if code is None:
        return "cut", "its time ran out"
    return ("ok", "") if code == 0 else ("failed", f"exit code {code}; see the log")


# Of the CPU's minutes: what exists only compiled, or takes as long to start as all the rest, stays out.
REHEARSED_LOSS = (
    *("--reps", "1", "--backend", "triton", "--providers", "kdflow", "trl", "liger fused", "kdflow, profiled"),
    *("kdflow, forward_kl", "kdflow, jsd"),
    *("eager, row chunks recomputed", "eager", "cce", "kdflow, eps 2e-4"),
)

REHEARSED_RING = ("--quick", "--providers", "kdflow ring", "multiprocessing.Queue", "pyzmq ipc")


def parts(*, rehearse: bool) -> list[Part]:
    """In the order of their worth, should time run out.

    The seconds are by the one run on an H100 so far: versions 17, build 19, and at most 160 for six cases of the
    loss. Of those 27 were steps, by their medians; the rest was starting 28 processes and compiling. Now most cases
    share eight processes. Estimates: of the loss the cases with goals 100, kernels and filter 40, cross-entropy 25,
    the sweep 25; ring 110, of which the cases with goals 80; tests of the rings 70, the others 60 side by side;
    ceilings 40, e2e 80. With the time of the whole command two thirds of that fit, so it is the last cases of each part
    that are cut, and ``--parts`` with a ``--budget`` of its own measures them.
    """
    quick = ("--quick",) if rehearse else ()
    return [
        Part("versions", 20, versions),
        Part("build", 30, build),  # without it half of the rest has nothing to do
        Part("loss", 190, suite("loss", *(REHEARSED_LOSS if rehearse else ("--budget-s", "4", "--reps", "7")))),
        Part("ring", 110, suite("ring", "--budget-s", "6", *(REHEARSED_RING if rehearse else ()))),
        Part("tests", 130, tests),
        Part("ceilings", 40, suite("ceilings", "--budget-s", "4", *quick)),
        Part("e2e", 80, suite("e2e", "--quick", "--budget-s", "10")),
    ]


def shape_names(*, rehearse: bool) -> dict[str, str]:
    """What the goals' cases call the main shapes, as the loss suite prints them."""
    from bench.cases.loss import GPU_SHAPES, REHEARSED_SHAPES

    return dict(zip(("main", "wide"), map(str, REHEARSED_SHAPES if rehearse else GPU_SHAPES), strict=True))
