"""A run without a teacher, and exports of its checkpoints."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kdflow.cli import COMMANDS
from kdflow.config import RunConfig, StudentConfig
from kdflow.config_file import dump_config, load_config
from kdflow.errors import CheckpointError, ConfigError, TrainingError
from kdflow.launcher.local import run
from kdflow.launcher.prepare import prepare
from kdflow.student import CheckpointFolder, export_checkpoint, read_weights
from support.run import metrics_of, train
from support.tiny import make_config


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("sft")
    options = {
        "output_dir": folder / "run",
        "algorithm.name": "sft",
        "student.model": tiny / "student",
        "student.num_threads": 1,
        "data.train": tiny / "conversations.jsonl",
        "data.num_eval_samples": 4,
        "data.max_length": 128,
        "training.num_steps": 24,
        "training.samples_per_step": 4,
        "training.tokens_per_microbatch": 256,
        "training.eval_every": 4,
        "training.save_every": 10,
        "training.keep_last": 2,
        "training.keep_best": "true",
        "optimizer.learning_rate": 3e-3,
    }
    config = load_config(None, [f"--{name}={value}" for name, value in options.items()])
    said: list[str] = []
    assert run(config, said.append)
    assert "model: " in said[-1]
    return config


def test_it_trains_without_a_teacher(finished: RunConfig) -> None:
    steps, evals = metrics_of(finished, "train"), metrics_of(finished, "eval")
    assert [m["step"] for m in steps] == list(range(1, 25))
    assert min(m["perplexity"] for m in evals) < 0.8 * evals[0]["perplexity"]
    assert all(m["loss"] == pytest.approx(m["ce_loss"]) for m in steps)
    assert all(m[name] is None for m in evals for name in ("kl", "top1_agreement"))
    assert all(m["teacher_tokens_per_s"] == 0.0 for m in steps)
    assert not list(Path(finished.output_dir, "logs").iterdir())


def test_the_newest_and_the_best_checkpoints_stay(finished: RunConfig) -> None:
    evals = {m["step"]: m["ce_loss"] for m in metrics_of(finished, "eval")}
    best = min((step for step in evals if step), key=lambda step: evals[step])
    folder = CheckpointFolder(Path(finished.output_dir, "checkpoints"))
    assert folder.find("best").info.num_steps_done == best
    assert folder.find("best").info.score == evals[best]
    kept = [c.info.num_steps_done for c in folder.all()]
    assert len(kept) == 2 + (best not in kept[-2:])
    assert kept[-1] == 24


def test_export_of_a_checkpoint_is_that_of_the_run(finished: RunConfig, tmp_path: Path) -> None:
    output = tmp_path / "hf"
    assert COMMANDS["export"]([finished.output_dir, "--output", str(output)]) == 0
    of_run = Path(finished.output_dir, "model")
    assert sorted(p.name for p in output.iterdir()) == sorted(p.name for p in of_run.iterdir())
    assert (output / "model.safetensors").read_bytes() == (of_run / "model.safetensors").read_bytes()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_text() == (of_run / name).read_text(), name
    assert json.loads((output / "config.json").read_text()) == json.loads((of_run / "config.json").read_text())
    with pytest.raises(CheckpointError, match="is not empty"):
        COMMANDS["export"]([finished.output_dir, "--output", str(output)])


def test_export_of_the_best(finished: RunConfig) -> None:
    assert COMMANDS["export"]([finished.output_dir, "--checkpoint", "best"]) == 0
    checkpoint = CheckpointFolder(Path(finished.output_dir, "checkpoints")).find("best")
    folder = Path(finished.output_dir, "exports", checkpoint.path.name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    weights = read_weights(checkpoint.path, torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].bfloat16()), name
    assert AutoTokenizer.from_pretrained(folder).chat_template
    with pytest.raises(CheckpointError, match="no checkpoint step-3 in"):
        COMMANDS["export"]([finished.output_dir, "--checkpoint", "step-3"])
    with pytest.raises(ConfigError, match="no file"):
        COMMANDS["export"](["/nowhere"])


def test_export_of_another_model_is_refused(finished: RunConfig, tiny: Path, tmp_path: Path) -> None:
    checkpoint = CheckpointFolder(Path(finished.output_dir, "checkpoints")).find(None)
    with pytest.raises(CheckpointError, match=r"expected the weights of .*, and \d+ are missing \['model\.layers\.2"):
        export_checkpoint(checkpoint.path, StudentConfig(str(tiny / "teacher")), tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_resume_that_is_refused_leaves_the_config(run_config) -> None:
    """So what is exported is what was trained."""
    pytest.importorskip("peft")
    sft = {"algorithm__name": "sft", "data__num_eval_samples": 0, "training__num_steps": 1}
    config = run_config(**sft, student__lora__rank=4)
    assert train(config).returncode == 0
    path = Path(config.output_dir, "config.yaml")
    written = path.read_text()
    result = train(config, "--resume=true", "--student.lora.alpha=64")
    assert result.returncode == 1
    assert "is of another run: student.lora: alpha / rank was 4.0, now it is 16.0" in result.stderr
    assert path.read_text() == written
    path.write_text(dump_config(run_config(**sft)))
    with pytest.raises(CheckpointError, match=r"expected adapters of rank 0 .*, got 4; give the config"):
        COMMANDS["export"]([config.output_dir])
    assert not Path(config.output_dir, "exports").exists()


def test_vanilla_needs_a_teacher(run_config) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.model: algorithm vanilla learns from a teacher"):
        prepare(run_config(teacher__model=""))


def with_a_bad_token(config: RunConfig, source: Path, folder: Path) -> tuple[Path, int]:
    """A model whose embedding of one token is not a number, and the only sample of `config` that has this token."""
    samples = list(prepare(config).train.samples)
    found = [{*s.input_ids.tolist()} for s in samples]
    once = [t for t in set().union(*found) if sum(t in ids for ids in found) == 1]
    token = min(once)
    (index,) = (i for i, ids in enumerate(found) if token in ids)
    shutil.copytree(source, folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(make_config(num_layers=2, tied=False))
    model.model.embed_tokens.weight.data[token] = math.nan
    model.save_pretrained(folder)
    return folder, samples[index].sample_id


def test_bad_steps_are_skipped_up_to_a_limit(run_config, tiny: Path, tmp_path: Path) -> None:
    options = {
        "algorithm__name": "sft",
        "data__num_eval_samples": 0,
        "training__num_steps": 20,
        "training__save_every": 100,
        "student__compute_dtype": "float32",
    }
    model, bad = with_a_bad_token(run_config(**options), tiny / "student", tmp_path / "model")
    config = run_config(student__model=model, **options, training__max_skipped_steps=3)
    assert run(config, lambda text: None)
    steps, warnings = metrics_of(config, "train"), metrics_of(config, "warning")
    skipped = [m["step"] for m in steps if m["loss"] is None]
    assert len(skipped) == 2  # 20 steps of 4 are two epochs of 40 samples
    assert [m["num_skipped"] for m in steps] == [sum(s <= m["step"] for s in skipped) for m in steps]
    for step, warning, count in zip(skipped, warnings, (1, 2), strict=True):
        text = warning["text"]
        assert text.startswith(f"step {step}: loss nan, gradient norm nan")
        assert bad in json.loads(text[text.index("[") : text.index("]") + 1])
        assert text.endswith(f"Skipped, {count} of at most 3")
    assert all(math.isfinite(m["loss"]) for m in steps if m["step"] not in skipped)

    strict = run_config(output_dir=tmp_path / "strict", student__model=model, **options, training__max_skipped_steps=1)
    with pytest.raises(TrainingError) as error:
        run(strict, lambda text: None)
    assert f"step {skipped[1]}: loss nan" in str(error.value)
    assert str(bad) in str(error.value)
    assert "1 steps were skipped before it" in str(error.value)
    (kept,) = CheckpointFolder(Path(strict.output_dir, "checkpoints")).all()
    assert (kept.info.num_steps_done, kept.info.num_skipped) == (skipped[1] - 1, 1)


def test_a_job_that_is_queued_again(run_config) -> None:
    """The same command starts a run and goes on with it."""
    for num_steps in (2, 4):
        config = run_config(algorithm__name="sft", resume="auto", training__num_steps=num_steps)
        assert config.resume == "auto"
        assert run(config, lambda text: None)
        assert [m["step"] for m in metrics_of(config, "train")] == list(range(1, num_steps + 1))
    assert load_config(Path(config.output_dir, "config.yaml")).resume is False
    with pytest.raises(ConfigError, match="resume"):
        run_config(resume="perhaps")
