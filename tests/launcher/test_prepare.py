"""Bad input is refused before any model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Config, LlamaForCausalLM, Qwen3NextConfig

from kdflow.config_file import load_config
from kdflow.errors import ConfigError, DataError
from kdflow.launcher.local import list_workers, run
from kdflow.launcher.prepare import RUN_ENTRIES, locked_output, open_output, prepare, write_config
from support.tiny import make_config, make_tokenizer


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


QUESTION = {"messages": [{"role": "user", "content": "Why?"}]}
ANSWERED = {"messages": [*QUESTION["messages"], {"role": "assistant", "content": "Because."}]}


def test_prepared(run_config) -> None:
    prepared = prepare(run_config())
    assert len(prepared.train.samples) == 36
    assert prepared.held_out is not None
    assert len(prepared.held_out.samples) == 4
    assert prepared.slot_bytes in (256 * 48 * 4, 256 * 48 * 2)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"teacher__backend": "sglagn"}, ConfigError, 'unknown teacher backend "sglagn"'),
        ({"algorithm__name": "vanila"}, ConfigError, 'did you mean "vanilla"'),
        ({"algorithm__divergence": "fkl"}, ConfigError, "forward_kl"),
        ({"algorithm__divergence": "jsd", "algorithm__divergence_args": "{beta: 2}"}, ConfigError, "beta"),
        ({"algorithm__kd_weight": 0}, ConfigError, "expected kd_weight or ce_weight above 0, got 0 for both"),
        ({"algorithm__divergence_args": "{bta: 1}"}, ConfigError, "bta"),
        ({"algorithm__divergence": "top1_ce", "student__vocab_parallel": "true"}, ConfigError, "needs whole rows"),
        ({"teacher__model": "/nowhere"}, ConfigError, "/nowhere is no folder"),
        ({"student__model": "/nowhere"}, ConfigError, "/nowhere is no folder"),
        ({"data__train": "/nowhere.jsonl"}, DataError, "no file /nowhere.jsonl"),
        ({"data__eval": "/nowhere.jsonl"}, DataError, "no file /nowhere.jsonl"),
        ({"data__num_eval_samples": 40}, DataError, "40 of them to be held out"),
    ],
)
def test_refused(run_config, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        prepare(run_config(**options))
    assert message in str(caught.value)


def test_rows_without_assistant_turns(run_config, tmp_path: Path) -> None:
    some = jsonl(tmp_path / "some.jsonl", [QUESTION, ANSWERED, ANSWERED, QUESTION])
    prepared = prepare(run_config(data__train=some, data__eval=some, data__num_eval_samples=2))
    assert prepared.train.report.skipped == {"no assistant turn (it has user)": 2}
    none = jsonl(tmp_path / "none.jsonl", [QUESTION] * 3)
    with pytest.raises(DataError, match="3 skipped: no assistant turn"):
        prepare(run_config(data__train=none, data__num_eval_samples=0))
    empty = jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="holds no rows"):
        prepare(run_config(data__train=empty))


def test_different_vocabularies(run_config, tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny / "teacher", other)
    make_tokenizer("quite another text " * 30).save_pretrained(other)
    with pytest.raises(ConfigError, match="have different vocabularies") as error:
        prepare(run_config(teacher__model=other))
    assert "choose models of one tokenizer" in str(error.value)


def test_models_that_do_not_fit_packed_samples(run_config, tiny: Path, tmp_path: Path) -> None:
    """In length, or in kind; told of before anything is tokenised or loaded."""
    said: list[str] = []
    prepare(run_config(data__max_length=200), said.append)
    assert not any("positions" in text for text in said)
    prepare(run_config(data__max_length=3000, training__tokens_per_microbatch=3000), said.append)
    warnings = [text for text in said if "positions" in text]
    for model, warning in zip(("student", "teacher"), warnings, strict=True):
        assert warning.startswith(f"warning: {tiny / model}: data.max_length: 3000 tokens, and llama was made for 2048")
    table, stateful = tmp_path / "table", tmp_path / "stateful"
    for folder, config in ((table, GPT2Config(n_positions=100)), (stateful, Qwen3NextConfig())):
        shutil.copytree(tiny / "student", folder)
        config.save_pretrained(folder)
    with pytest.raises(ConfigError, match=r"table: data\.max_length: got 128, but gpt2 has a table of 100 positions"):
        prepare(run_config(teacher__model=table))
    with pytest.raises(ConfigError, match=r"student\.model: .* has layers of linear_attention"):
        prepare(run_config(student__model=stateful))


def test_several_teachers(run_config, tiny: Path, tmp_path: Path) -> None:
    """Names of their own in what is said of each, and room for the widest."""
    wide = tmp_path / "wide"
    LlamaForCausalLM(make_config(num_layers=1, hidden_size=64)).save_pretrained(wide)
    AutoTokenizer.from_pretrained(tiny / "teacher").save_pretrained(wide)
    part = jsonl(tmp_path / "part.jsonl", [ANSWERED] * 8)
    sources = [{"source": f"{tiny / 'conversations.jsonl'}", "teacher": "wide"}, {"source": f"{part}", "teacher": "b"}]

    def config(model: Path, **options):
        teachers = {"wide": {"model": str(wide), "dtype": "float32"}, "b": {"model": str(model), "dtype": "float32"}}
        return run_config(teachers=json.dumps(teachers), data__train=json.dumps(sources), **options)

    prepared = prepare(config(tiny / "teacher"))
    assert prepared.slot_bytes == 256 * 64 * 4
    assert set(prepared.algorithms) == {"wide", "b"}
    gpus = [(worker.label, worker.gpu) for worker in list_workers(config(tiny / "teacher", student__num_ranks=2))]
    assert gpus == [("teacher-wide-0", 2), ("teacher-b-0", 3)]
    with pytest.raises(ConfigError, match=r"teachers\.b: model: /nowhere is no folder"):
        prepare(config(Path("/nowhere")))
    make_tokenizer("quite another text " * 30).save_pretrained(wide)
    with pytest.raises(ConfigError, match=rf"teacher wide \({wide}\) \(\d+ tokens\) have different vocabularies"):
        prepare(config(tiny / "teacher"))


def test_output_folder(run_config, tmp_path: Path) -> None:
    config = run_config()
    folder = open_output(config)
    open_output(config)  # so far nothing has been trained there
    write_config(config, folder)
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="holds a run; add --resume=true"):
        open_output(config)
    written = (folder / "config.yaml").read_text()
    open_output(run_config(resume="true"))
    assert (folder / "metrics.jsonl").exists()
    assert (folder / "config.yaml").read_text() == written, "the checkpoint may be refused yet"
    with pytest.raises(ConfigError, match=r"resume: seed was 0 .* now it is 1"):
        open_output(run_config(resume="true", seed=1))
    open_output(run_config(overwrite="true"))
    assert not (folder / "metrics.jsonl").exists()
    assert (folder / "mine.txt").exists()
    assert {p.name for p in folder.iterdir()} <= {*RUN_ENTRIES, "config.yaml", "mine.txt"}
    with pytest.raises(ConfigError, match="holds no run"):
        open_output(run_config(output_dir=tmp_path / "new", resume="true"))


def test_an_overwrite_that_is_cut_short_is_gone_on_with(run_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever entry it came to; and checkpoints without a config are nobody's to write beside."""
    folder = open_output(run_config())
    write_config(run_config(), folder)
    for name in set(RUN_ENTRIES) - {"metrics.jsonl"}:
        (folder / name).mkdir(exist_ok=True)
    kept = {p.name for p in folder.iterdir()}

    def cut_short(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", cut_short)
        with pytest.raises(KeyboardInterrupt):
            open_output(run_config(overwrite="true"))
    assert {p.name for p in folder.iterdir()} == kept
    (folder / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="holds a run"):
        open_output(run_config())
    open_output(run_config(overwrite="true"))
    assert {p.name for p in folder.iterdir()} == {"logs"}


def test_an_overwrite_keeps_what_the_run_reads(run_config, tiny: Path) -> None:
    folder = open_output(run_config())
    write_config(run_config(), folder)
    shutil.copytree(tiny / "student", folder / "model")
    with pytest.raises(ConfigError, match=r"output_dir: student\.model is .*, which lies in what the run writes in"):
        open_output(
            run_config(output_dir=folder.parent, student__model=shutil.copytree(folder, folder.parent / "model"))
        )
    data = jsonl(folder / "logs" / "data.jsonl", [ANSWERED] * 8)
    (folder / "exports").symlink_to(tiny / "teacher")
    for option, value in (
        ("student.model", folder / "model"),
        ("teacher.model", folder / "exports"),
        ("data.train", data),
        ("data.cache_dir", folder / "logs"),
    ):
        config = run_config(overwrite="true", **{option.replace(".", "__"): value})
        with pytest.raises(ConfigError, match=rf"output_dir: {option} is {value}, which lies in what the run"):
            open_output(config)
    assert data.is_file()
    open_output(run_config(overwrite="true"))
    assert {p.name for p in folder.iterdir()} == {"logs", "config.yaml"}
    assert (tiny / "teacher" / "config.json").is_file(), "a link is deleted, not what it leads to"


def test_an_output_folder_that_cannot_be(run_config, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "file", [])
    with pytest.raises(ConfigError, match=f"output_dir: expected a folder, got the file {file}"):
        run(run_config(output_dir=file))
    with pytest.raises(ConfigError, match=f"output_dir: {file}/run cannot be written"):
        run(run_config(output_dir=file / "run"))


def test_how_a_run_was_started_is_no_part_of_its_config(run_config) -> None:
    folder = open_output(run_config())
    for options in ({"overwrite": "true"}, {"resume": "true"}):
        write_config(run_config(**options), folder)
        assert load_config(folder / "config.yaml") == run_config()


def test_one_run_at_a_time_in_a_folder(run_config) -> None:
    config = run_config()
    with locked_output(config):
        write_config(config, open_output(config))
        with pytest.raises(ConfigError, match=r"another run is writing to .*; wait for its end, or choose another"):
            run(run_config(overwrite="true"), say=lambda text: None)
        assert Path(config.output_dir, "config.yaml").exists()
    with locked_output(config):
        pass
