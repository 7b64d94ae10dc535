"""Two teachers that have little in common, each in processes of its own, and one student."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GraniteConfig, GraniteForCausalLM

from kdflow.config import RunConfig
from kdflow.data import load_datasets, training_steps
from kdflow.student import CheckpointFolder, read_weights
from kdflow.types import Sample
from support.run import command, metrics_of, train
from support.tiny import VOCAB_SIZE, make_conversations

NUM_STEPS = 6
TEACHERS = ("code", "math")
NUM_MATH_ROWS = 15


def make_wide_teacher(tokenizer: Path, folder: Path) -> None:
    """Wider than the other one, with a padded head that is not tied, and a divisor of its logits."""
    torch.manual_seed(5)
    config = GraniteConfig(
        vocab_size=VOCAB_SIZE + 16,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        logits_scaling=0.5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    GraniteForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers")
    make_wide_teacher(tiny / "teacher", folder / "wide")
    rows = make_conversations()
    for name, part in (("math", rows[:NUM_MATH_ROWS]), ("code", rows[NUM_MATH_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    return folder


@pytest.fixture
def make_config(run_config, tiny: Path, folder: Path):
    def make(**options: object) -> RunConfig:
        teachers = {
            "math": {"model": str(tiny / "teacher"), "dtype": "float32", "num_threads": 1},
            "code": {"model": str(folder / "wide"), "dtype": "float32", "num_threads": 1, **options.pop("code", {})},  # type: ignore[dict-item]
        }
        sources = [{"source": str(folder / f"{name}.jsonl"), "teacher": name} for name in ("math", "code")]
        defaults = {
            "student__compute_dtype": "float32",
            "algorithm__ce_weight": 0.2,
            "training__num_steps": NUM_STEPS,
            "training__tokens_per_microbatch": 128,
            "training__save_every": 3,
            "training__keep_last": 9,
        }
        return run_config(teachers=json.dumps(teachers), data__train=json.dumps(sources), **{**defaults, **options})

    return make


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight") / "run"


def by_hand(models: dict[str, str], student: str, samples: list[Sample]) -> dict[str, list[float]]:
    """Sums over the loss tokens of each teacher: KL(teacher || student), cross-entropy, and how many they are.

    Of transformers' own logits, one sample at a time.
    """
    loaded = {name: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for name, model in models.items()}
    learner = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    sums = {name: [0.0, 0.0, 0.0] for name in models}
    for sample in samples:
        ids = torch.from_numpy(sample.input_ids.copy()).long()
        said = torch.from_numpy(sample.loss_mask[1:].copy())
        name = "math" if sample.sample_id < NUM_MATH_ROWS else "code"
        with torch.no_grad():
            q = learner(input_ids=ids[None]).logits[0, :-1][said].log_softmax(-1)
            p = loaded[name](input_ids=ids[None]).logits[0, :-1][said, :VOCAB_SIZE].log_softmax(-1)
        sums[name][0] += (p.exp() * (p - q)).sum().item()
        sums[name][1] -= q.gather(1, ids[1:][said][:, None]).sum().item()
        sums[name][2] += int(said.sum())
    return sums


def assert_found(found: dict, kl_of_all: float, expected: dict[str, list[float]], ce_weight: float) -> None:
    total = sum(n for *_, n in expected.values())
    assert found["num_loss_tokens"] == total
    assert kl_of_all == pytest.approx(sum(kl for kl, *_ in expected.values()) / total, rel=1e-4)
    assert found["ce_loss"] == pytest.approx(sum(ce for _, ce, _ in expected.values()) / total, rel=1e-4)
    assert set(found["teachers"]) == {name for name, (*_, n) in expected.items() if n}
    for name, own in found["teachers"].items():
        kl, ce, n = expected[name]
        assert own["num_loss_tokens"] == n
        assert own["kd_loss"] == pytest.approx(kl / n, rel=1e-4), name
        assert own["ce_loss"] == pytest.approx(ce / n, rel=1e-4), name
        assert own["loss"] == pytest.approx(own["kd_loss"] + ce_weight * own["ce_loss"], rel=1e-5)


def test_losses_are_those_worked_out_by_hand(make_config, straight: Path) -> None:
    config = make_config(output_dir=straight)
    result = train(config)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in (straight / "logs").iterdir()} == {"teacher-math-0.log", "teacher-code-0.log"}
    models = {name: teacher.model for name, teacher in config.teachers.items()}
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    data, held_out = load_datasets(config.data, tokenizer, config.seed, TEACHERS)
    assert held_out is not None
    (step,) = training_steps(
        data.samples, num_steps=1, samples_per_step=4, tokens_per_microbatch=9999, seed=config.seed
    )
    drawn = [i for m in step.microbatches for i in m.sample_ids]
    samples = [sample for sample in data.samples if sample.sample_id in drawn]
    assert len(samples) == len(drawn) == 4
    expected = by_hand(models, config.student.model, samples)
    assert all(n for *_, n in expected.values()), "both teachers have a part in it"
    first, last = (metrics_of(config, "train")[i] for i in (0, -1))
    assert_found(first, first["kd_loss"], expected, ce_weight=0.2)
    assert first["loss"] == pytest.approx(first["kd_loss"] + 0.2 * first["ce_loss"], rel=1e-5)
    before = metrics_of(config, "eval")[0]
    assert_found(before, before["kl"], by_hand(models, config.student.model, list(held_out.samples)), ce_weight=1.0)
    assert f"loss {last['loss']:.4f} (" in result.stdout
    fingerprint = CheckpointFolder(straight / "checkpoints").find(None).info.fingerprint
    assert {name: fingerprint[f"teacher {name}"] for name in TEACHERS} == models


@pytest.mark.parametrize("schedule", ["overlap", "colocate"])
def test_two_ranks_and_three_workers_find_the_same(make_config, straight: Path, tmp_path: Path, schedule: str) -> None:
    one = make_config(output_dir=straight)
    two = make_config(
        output_dir=tmp_path / "two", student__num_ranks=2, code={"num_workers": 2}, transport__schedule=schedule
    )
    if not (straight / "model").exists():
        assert train(one).returncode == 0
    result = train(two)
    assert result.returncode == 0, result.stderr
    for kind in ("train", "eval"):
        for ours, theirs in zip(metrics_of(one, kind), metrics_of(two, kind), strict=True):
            for name in ("loss", "grad_norm", "ce_loss") if kind == "train" else ("kl", "ce_loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3), (kind, name)
            assert set(ours["teachers"]) == set(theirs["teachers"])
            for name, own in ours["teachers"].items():
                assert own["num_loss_tokens"] == theirs["teachers"][name]["num_loss_tokens"]
                assert own["kd_loss"] == pytest.approx(theirs["teachers"][name]["kd_loss"], rel=1e-3)


def test_resumed_run_is_the_same_to_the_bit(make_config, straight: Path, tmp_path: Path) -> None:
    one = make_config(output_dir=straight)
    if not (straight / "model").exists():
        assert train(one).returncode == 0
    shutil.copytree(straight, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{NUM_STEPS:06d}")
    resumed = make_config(output_dir=tmp_path / "resumed")
    result = train(resumed, "--resume=true")
    assert result.returncode == 0, result.stderr
    assert "step 4/6" in result.stdout
    assert "step 3/6" not in result.stdout
    kept = ("step", "loss", "grad_norm", "teachers")
    lines = [[{name: m[name] for name in kept} for m in metrics_of(c, "train")] for c in (one, resumed)]
    assert lines[0] == lines[1]
    found = [CheckpointFolder(Path(c.output_dir, "checkpoints")).find(None) for c in (one, resumed)]
    weights = [read_weights(c.path, torch.float32) for c in found]
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())


def test_a_teacher_that_is_gone_is_named_while_the_other_lives(make_config) -> None:
    """Math is started again when it is killed; code, which may not be, ends the run."""
    config = make_config(code={"max_restarts": 0}, training__num_steps=500, training__save_every=0)

    def kill(launcher: int, teacher: str) -> int:
        workers = [p for p in psutil.Process(launcher).children() if "kdflow.teacher.worker" in p.cmdline()]
        (worker,) = (
            p for p in workers if json.loads(p.cmdline()[-1])["teacher"]["model"] == config.teachers[teacher].model
        )
        worker.send_signal(signal.SIGKILL)
        return worker.pid

    with subprocess.Popen(command(config), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        killed, began = {}, 0.0
        for line in process.stdout:
            if line.startswith("step 2/"):
                killed["math"] = kill(process.pid, "math")
            if line.startswith("step 12/"):  # by then math has answered again
                killed["code"], began = kill(process.pid, "code"), time.monotonic()
            if "is started again" in line:
                assert f"teacher process {killed['math']} " in line
        error = process.stderr.read()
        assert process.wait(timeout=30) == 1
    assert 0 < time.monotonic() - began < 30
    assert f"teacher process {killed['code']} ended with signal 9" in error
    assert "teacher-code-0.log" in error


def test_ranks_have_different_teachers_at_the_same_time(make_config) -> None:
    """What the comparison of one rank and two is worth."""
    config = make_config()
    tokenizer = AutoTokenizer.from_pretrained(config.student.model)
    data, _ = load_datasets(config.data, tokenizer, config.seed, TEACHERS)
    ranks = [
        training_steps(
            data.samples,
            num_steps=NUM_STEPS,
            samples_per_step=4,
            tokens_per_microbatch=128,
            seed=config.seed,
            rank=rank,
            num_ranks=2,
        )
        for rank in range(2)
    ]
    pairs = [
        {m.teacher_name for m in pair}
        for steps in zip(*ranks, strict=True)
        for pair in zip(*(step.microbatches for step in steps), strict=True)
    ]
    assert {"math", "code"} in pairs
