"""The job that all providers of ``bench e2e`` do: config, samples, steps, and how a run is timed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cases.e2e_models import model_folders
from bench.client import ROOT
from bench.memory import GpuSampler, TreeSampler, process_tree
from bench.model import KEEP, UnavailableError
from kdflow.config import RunConfig
from kdflow.config_file import load_config
from kdflow.data import Step, load_datasets, training_steps
from kdflow.errors import ConfigError
from kdflow.modeling import load_tokenizer, resolve_device, resolve_dtype
from kdflow.tracing import FOLDER, merge
from kdflow.types import Sample

Params = Mapping[str, Any]
TIMEOUT_S = 900.0


def run_overrides(params: Params, output_dir: str, *, num_tail_steps: int = 0) -> list[str]:
    """The options that make the config's run a measured one.

    Only a teacher that runs ahead needs a tail of steps after the measured ones.
    """
    total = params["num_warm_up_steps"] + params["num_measured_steps"] + num_tail_steps
    folders = model_folders(params["models"]) if params["models"] else {}
    return [
        *(f"--{role}.model={folder}" for role, folder in folders.items()),
        *params["overrides"],
        f"--output_dir={output_dir}",
        f"--training.num_steps={total}",
        "--training.eval_every=0",
        "--training.log_every=1",
        "--data.num_eval_samples=0",
        "--optimizer.schedule=constant",
        "--optimizer.warmup_steps=0",
        "--optimizer.learning_rate=1e-5",  # so low that rounding does not part the providers' losses
        f"--student.device={params['device'].partition(':')[0]}",
        f"--teacher.device={params['device'].partition(':')[0]}",
    ]


@dataclass(frozen=True)
class Job:
    """What the config says, for those who do it without kdflow."""

    config: RunConfig
    steps: tuple[Step, ...]
    samples: Mapping[int, Sample]
    dtype: torch.dtype
    num_warm_up: int
    num_measured: int
    peer_batch_size: int

    @property
    def measured_steps(self) -> Sequence[Step]:
        return self.steps[self.num_warm_up : self.num_warm_up + self.num_measured]

    @property
    def num_tokens(self) -> int:
        """Tokens of the measured steps, padding not among them."""
        return sum(step.num_tokens for step in self.measured_steps)

    def samples_of(self, step: Step) -> list[Sample]:
        ids = sorted(i for microbatch in step.microbatches for i in microbatch.sample_ids)
        return [self.samples[i] for i in ids]

    def batches_of(self, step: Step) -> list[list[Sample]]:
        """The step's samples in the batches of those who pad."""
        samples = self.samples_of(step)
        size = self.peer_batch_size or len(samples)
        return [samples[start : start + size] for start in range(0, len(samples), size)]


def load_job(params: Params) -> Job:
    """Reads config and data; raises UnavailableError where the models have not been prepared."""
    os.chdir(ROOT)  # the config's paths are relative to the checkout
    config = load_config(params["config"], run_overrides(params, output_dir="unused"))
    try:
        tokenizer = load_tokenizer(config.student.model)
    except ConfigError as error:
        raise UnavailableError(f"{error}; run `make quickstart` once") from None
    train, _ = load_datasets(config.data, tokenizer, config.seed)
    steps = training_steps(
        train.samples,
        num_steps=config.training.num_steps,
        samples_per_step=config.training.samples_per_step,
        tokens_per_microbatch=config.training.tokens_per_microbatch,
        seed=config.seed,
    )
    return Job(
        config=config,
        steps=tuple(steps),
        samples={sample.sample_id: sample for sample in train.samples},
        dtype=resolve_dtype(config.student.compute_dtype, resolve_device(config.student.device)),
        num_warm_up=params["num_warm_up_steps"],
        num_measured=params["num_measured_steps"],
        peer_batch_size=params["peer_batch_size"],
    )


def measured_run(params: Params, job: Job, command: Callable[[str], Sequence[str]]) -> dict[str, float]:
    """Run a command that writes ``metrics.jsonl`` into the folder it is given; time and memory.

    The time runs from the end of the last warm-up step to the end of the last measured one. The
    memory is the highest sum of the private memory of all processes of the run up to that moment;
    what comes after it (the tail, exporting the model) is in ``whole_run_mib``. On CUDA it is that
    of the GPU, and the processes' own is in ``host_mib``. Of what only kdflow writes there are the
    shares of the time in which the student's device stood still for want of teacher rows, and in
    which teachers prefilled.
    """
    kind, _, index = params["device"].partition(":")
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    begin = time.perf_counter()
    end = job.num_warm_up + job.num_measured
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        log = stack.enter_context(tempfile.TemporaryFile())
        gpu = stack.enter_context(GpuSampler(int(index or 0))) if kind == "cuda" else None
        process = subprocess.Popen(command(folder), cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        host = stack.enter_context(TreeSampler(process.pid))
        try:
            _wait(process, folder, num_steps=end if params["stop_when_measured"] else None)
        finally:
            _end(process)
        _keep_timeline(Path(folder, FOLDER), job.config.transport.num_slots)
        records = _records(folder)
        if len(records) < end:
            log.seek(0)
            raise RuntimeError(_failure(log.read().decode(errors="replace"), process.returncode))
    first, last = records[job.num_warm_up - 1], records[end - 1]
    seconds = last["time"] - first["time"]
    memory = gpu or host
    measures = {
        "seconds": seconds,
        "work": float(job.num_tokens),
        "peak_mib": memory.peak_until(last["time"]),
        "whole_run_mib": memory.peak_until(float("inf")),
        "host_mib": host.peak_until(last["time"]),
        "first_loss": records[0]["loss"],
        "last_loss": last["loss"],
        "wall_s": time.perf_counter() - begin,
    }
    measured = records[job.num_warm_up : end]
    if "teacher_wait_s" in last:
        measures["wait_share"] = sum(m["teacher_wait_s"] for m in measured) / seconds
        measures["prefill_share"] = sum(m["num_tokens"] / m["teacher_tokens_per_s"] for m in measured) / seconds
    return measures


def _keep_timeline(folder: Path, num_slots: int) -> None:
    """That of the last run stays beside the result file. A run that was ended when measured has not merged its own."""
    if KEEP in os.environ and folder.is_dir():
        merge(folder, num_slots)
        shutil.copyfile(folder / "timeline.json", f"{os.environ[KEEP]}.timeline.json")


def _wait(process: subprocess.Popen[bytes], folder: str, *, num_steps: int | None) -> None:
    """Until the process ends, or has done ``num_steps``. A failure shows in what it left behind."""
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and (num_steps is None or len(_records(folder)) < num_steps):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the run took longer than {TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """With its children, whose GPU memory the next one needs."""
    running = process.poll() is None
    tree = process_tree(process.pid) if running else []
    process.kill()
    process.wait()
    deadline = time.monotonic() + 15.0
    while any(Path(f"/proc/{pid}").exists() for pid in tree) and time.monotonic() < deadline:
        time.sleep(0.05)


def _records(folder: str) -> list[dict[str, Any]]:
    """Lines of finished steps; one that is being written is not there yet."""
    path = Path(folder, "metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record for record in found if record["kind"] == "train"]


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _failure(log: str, code: int) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"
