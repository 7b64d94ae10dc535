"""The slice end to end: `kdflow train` in processes of its own, on tiny models and real text."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdflow.config import RunConfig
from kdflow.config_file import load_config
from support.run import command, metrics_of, train


def children(pid: int) -> set[int]:
    """All descendants of a process."""
    found: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found |= {int(stat.parent.name)} | children(int(stat.parent.name))
    return found


def alive(pids: set[int]) -> set[int]:
    return {p for p in pids if Path(f"/proc/{p}").exists() and "Z" not in _state(p)}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


@contextmanager
def started(config: RunConfig, until: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own, once a line of it begins so."""
    with subprocess.Popen(
        command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(until):
                break
        yield process


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_run_exports_metrics_and_resolved_config(run_config) -> None:
    config = run_config(training__num_steps=12, training__eval_every=6, algorithm__ce_weight=0.1)
    result = train(config)
    assert result.returncode == 0, result.stderr
    folder = Path(config.output_dir)
    steps, evals = metrics_of(config, "train"), metrics_of(config, "eval")
    assert [m["step"] for m in steps] == list(range(1, 13))
    assert [m["step"] for m in evals] == [0, 6, 12]
    assert evals[-1]["kl"] < 0.8 * evals[0]["kl"]
    assert steps[0]["teacher_tokens_per_s"] > 0
    assert list((folder / "tensorboard").glob("events.*"))
    assert load_config(folder / "config.yaml") == config
    assert "step 12/12" in result.stdout
    assert "eval after 12 steps: KL(teacher||student)" in result.stdout
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What about assert?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]
    again = train(config)
    assert again.returncode == 1
    assert "holds a run; add --resume=true" in again.stderr


def test_two_ranks_and_two_teachers_match_one_of_each(run_config, tmp_path: Path) -> None:
    """With a microbatch for each rank, and with one that they share."""
    exact = {
        "teacher__dtype": "float32",
        "student__compute_dtype": "float32",
        "training__tokens_per_microbatch": 128,
    }
    one = run_config(output_dir=tmp_path / "one", **exact)
    two = run_config(output_dir=tmp_path / "two", student__num_ranks=2, teacher__num_workers=2, **exact)
    shared = run_config(output_dir=tmp_path / "shared", student__num_ranks=2, student__context_parallel=2, **exact)
    configs = (one, two, shared)
    for config in configs:
        result = train(config)
        assert result.returncode == 0, result.stderr
    for kind, name in (("train", "loss"), ("train", "grad_norm"), ("train", "student_entropy"), ("eval", "kl")):
        losses, *others = [[m[name] for m in metrics_of(c, kind)] for c in configs]
        for other in others:
            assert losses == pytest.approx(other, rel=1e-3), name
    weights, *others = [AutoModelForCausalLM.from_pretrained(Path(c.output_dir, "model")).state_dict() for c in configs]
    for name, weight in weights.items():
        for other in others:
            torch.testing.assert_close(weight, other[name], atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="older ones take modules from where they are started")
def test_files_beside_the_command_are_no_modules(run_config, tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('not this one')\n")
    arguments = command(run_config(student__num_ranks=2))[3:]
    kdflow = Path(sys.executable).with_name("kdflow")
    result = subprocess.run([kdflow, *arguments], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_an_option_that_ranks_refuse_is_told_in_a_line(run_config) -> None:
    result = train(run_config(student__num_ranks=2, student__vocab_parallel=True))
    assert result.returncode == 1
    assert re.fullmatch(
        r"kdflow train: error: student rank \d: student\.vocab_parallel: this student's head is tied .*\n",
        result.stderr,
    )


@pytest.mark.parametrize("num_ranks, to_all", [(1, True), (2, False), (2, True)])
def test_ctrl_c_saves_and_resume_goes_on(run_config, tmp_path: Path, num_ranks: int, to_all: bool) -> None:
    """A terminal signals the whole group, others the command alone."""
    config = run_config(output_dir=tmp_path / "stopped", training__num_steps=30, student__num_ranks=num_ranks)
    with started(config, "step 3/") as process:
        processes = children(process.pid)
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT if to_all else signal.SIGTERM)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 130
    assert processes
    assert not alive(processes)
    assert "--resume=true goes on" in rest
    assert errors == "\nstopping after this step, with a checkpoint; once more ends at once, without one\n"
    done = metrics_of(config, "train")[-1]["step"]
    assert 3 <= done < 30
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{done:06d}").is_dir()
    if num_ranks == 1:
        straight = run_config(output_dir=tmp_path / "straight", training__num_steps=30)
        for result in (train(straight), train(config, "--resume=true")):
            assert result.returncode == 0, result.stderr
        losses = [[m["loss"] for m in metrics_of(c, "train")] for c in (straight, config)]
        assert losses[0] == losses[1]  # to the bit
        fewer = train(config, "--resume=true", "--training.num_steps=29")
        assert fewer.returncode == 1
        assert "the checkpoint is of step 30, and training.num_steps is 29; give at least as many" in fewer.stderr


def test_the_second_ctrl_c_ends_at_once(run_config) -> None:
    config = run_config(student__num_ranks=2, training__num_steps=100_000, training__samples_per_step=4000)
    with started(config, "eval after 0 steps") as process:
        processes = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("stopping after this step"):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
    assert errors == "kdflow train: interrupted\n"
    assert not alive(processes)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_run_goes_on_where_nobody_reads_what_it_says(run_config, num_ranks: int) -> None:
    """As after `| head`, or where Ctrl-C ends `tee` first."""
    config = run_config(training__num_steps=500, student__num_ranks=num_ranks)
    with started(config, "step 2/") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        seen = len(metrics_of(config, "train"))
        wait_until(lambda: len(metrics_of(config, "train")) > seen + 2)
        process.terminate()
        assert process.wait(timeout=60) == 130
    done = metrics_of(config, "train")[-1]["step"]
    assert Path(config.output_dir, "checkpoints", f"step-{done:06d}").is_dir()


OWN_DIVERGENCE = """
import sys
from dataclasses import dataclass
from kdflow.config_file import load_config
from kdflow.launcher.local import run
from kdflow_kernels import Divergence, register_divergence

@register_divergence("own")
@dataclass(frozen=True)
class Own(Divergence):
    def rows(self, log_p, log_q):
        return (log_p.exp() * (log_p - log_q)).sum(-1)

if __name__ == "__main__":
    assert run(load_config(sys.argv[1]))
"""


def test_several_ranks_have_what_the_callers_file_registers(run_config, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN_DIVERGENCE)
    path = command(run_config(student__num_ranks=2))[4]
    Path(path).write_text(Path(path).read_text().replace("divergence: forward_kl", "divergence: own"))
    result = subprocess.run([sys.executable, tmp_path / "mine.py", path], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr


def test_dead_teacher_is_named_and_nothing_hangs(run_config) -> None:
    config = run_config(training__num_steps=500, teacher__max_restarts=0)
    with subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("step 2/"):
                break
        started = children(process.pid)
        (teacher,) = (p for p in started if b"kdflow.teacher.worker" in Path(f"/proc/{p}/cmdline").read_bytes())
        os.kill(teacher, signal.SIGKILL)
        began = time.monotonic()
        process.stdout.read()
        error = process.stderr.read()
        assert process.wait(timeout=30) == 1
    assert time.monotonic() - began < 30
    assert f"teacher process {teacher} ended with signal 9" in error
    assert "teacher-0.log" in error
    assert not alive(started)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_killed_launcher_leaves_nothing(run_config, num_ranks: int) -> None:
    with started(run_config(training__num_steps=500, student__num_ranks=num_ranks), "step 2/") as process:
        processes = children(process.pid)
        assert len(processes) == (1 if num_ranks == 1 else 3)
        process.kill()
    wait_until(lambda: not alive(processes))


def test_a_killed_rank_is_named(run_config) -> None:
    with started(run_config(training__num_steps=500, student__num_ranks=2), "step 2/") as process:
        processes = children(process.pid)
        ranks = [p for p in processes if b"kdflow.launcher.ranks" in Path(f"/proc/{p}/cmdline").read_bytes()]
        os.kill(max(ranks), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
    assert re.fullmatch(r"kdflow train: error: student rank \d ended with signal 9\n", errors)
    assert not alive(processes)


def test_damaged_weights_are_named(run_config, tiny: Path, tmp_path: Path) -> None:
    """A head that the student cannot read, and a layer that only the teacher reads."""
    head, layer = tmp_path / "head", tmp_path / "layer"
    shutil.copytree(tiny / "teacher", head)
    (head / "model.safetensors").write_bytes(b"not a model")
    result = train(run_config(teacher__model=head))
    assert result.returncode == 1
    assert f"error: {head}: its weights cannot be read" in result.stderr
    assert "Traceback" not in result.stderr

    shutil.copytree(tiny / "teacher", layer)
    (layer / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny / "teacher").save_pretrained(layer, max_shard_size="80KB")
    index = json.loads((layer / "model.safetensors.index.json").read_text())["weight_map"]
    shards = set(index.values()) - {shard for name, shard in index.items() if "embed" in name}
    (layer / sorted(shards)[0]).write_bytes(b"not a model")
    result = train(run_config(teacher__model=layer, overwrite="true"))
    assert result.returncode == 1
    assert "ended with exit code 1; its last lines" in result.stderr
    assert f"{layer}: its weights cannot be read" in result.stderr
