"""The job that all providers of ``bench e2e`` do: config, samples, steps, and how a run is timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.client import ROOT
from bench.memory import TreeSampler
from bench.model import UnavailableError
from kdflow.config import RunConfig, load_config
from kdflow.data import Step, load_datasets, training_steps
from kdflow.errors import ConfigError
from kdflow.modeling import load_tokenizer, resolve_device, resolve_dtype
from kdflow.types import Sample

Params = Mapping[str, Any]
TIMEOUT_S = 900.0


def run_overrides(params: Params, output_dir: str, *, num_tail_steps: int = 0) -> list[str]:
    """The options that make the config's run a measured one.

    Only a teacher that runs ahead needs a tail of steps after the measured ones.
    """
    total = params["num_warm_up_steps"] + params["num_measured_steps"] + num_tail_steps
    return [
        *params["overrides"],
        f"--output_dir={output_dir}",
        f"--training.num_steps={total}",
        "--training.eval_every=0",
        "--training.log_every=1",
        "--data.num_eval_samples=0",
        "--optimizer.schedule=constant",
        "--optimizer.warmup_steps=0",
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
    )


def measured_run(params: Params, job: Job, command: Callable[[str], Sequence[str]]) -> dict[str, float]:
    """Run a command that writes ``metrics.jsonl`` into the folder it is given; time and memory.

    The time runs from the end of the last warm-up step to the end of the last measured one. The
    memory is the highest sum of the private memory of all processes of the run up to that moment;
    what comes after it (the tail, exporting the model) is in ``whole_run_mib``.
    """
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command(folder), cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            with TreeSampler(process.pid) as sampler:
                process.wait(timeout=TIMEOUT_S)
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise RuntimeError(_failure(log.read().decode(errors="replace"), process.returncode))
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    records = [record for line in lines if (record := json.loads(line))["kind"] == "train"]
    first, last = records[job.num_warm_up - 1], records[job.num_warm_up + job.num_measured - 1]
    seconds = last["time"] - first["time"]
    return {
        "seconds": seconds,
        "work": float(job.num_tokens),
        "peak_mib": sampler.peak_until(last["time"]),
        "whole_run_mib": sampler.peak_until(float("inf")),
        "first_loss": records[0]["loss"],
        "last_loss": last["loss"],
        "wall_s": time.perf_counter() - begin,
    }


def python(*arguments: str) -> list[str]:
    return [sys.executable, *arguments]


def _failure(log: str, code: int) -> str:
    lines = [line for line in log.splitlines() if line.strip()]
    return f"exit code {code}: {lines[-1] if lines else 'no output'}"
