"""The slice end to end: `kdflow train` in processes of its own, on tiny models and real text."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_an_option_that_ranks_refuse_is_told_in_a_line(run_config) -> None:
    result = train(run_config(student__num_ranks=2, student__vocab_parallel=True))
    assert result.returncode == 1
    assert re.fullmatch(
        r"kdflow train: error: student rank \d: student\.vocab_parallel: this student's head is tied .*\n",
        result.stderr,
    )


def test_ctrl_c_saves_and_resume_goes_on(run_config, tmp_path: Path) -> None:
    straight = run_config(output_dir=tmp_path / "straight", training__num_steps=30)
    assert train(straight).returncode == 0
    config = run_config(output_dir=tmp_path / "stopped", training__num_steps=30)
    with subprocess.Popen(
        command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        started = children(process.pid)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 130
    assert started
    assert not alive(started)
    assert "--resume=true goes on" in rest
    done = metrics_of(config, "train")[-1]["step"]
    assert 3 <= done < 30
    result = train(config, "--resume=true")
    assert result.returncode == 0, result.stderr
    assert load_config(Path(config.output_dir, "config.yaml")).resume
    losses = [[m["loss"] for m in metrics_of(c, "train")] for c in (straight, config)]
    assert losses[0] == losses[1]  # to the bit


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


def test_killed_launcher_leaves_nothing(run_config) -> None:
    config = run_config(training__num_steps=500)
    with subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 2/"):
                break
        started = children(process.pid)
        assert started
        process.kill()
    deadline = time.monotonic() + 20
    while alive(started) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(started)


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
