from __future__ import annotations

from pathlib import Path

import pytest

from kdflow.config import DataSource, TeacherConfig, TrainingConfig
from kdflow.config_file import dump_config, load_config, option_names
from kdflow.errors import ConfigError

MINIMAL = ["--output_dir=o", "--teacher.model=t", "--student.model=s", "--data.train=d.jsonl"]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_file_and_overrides(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "output_dir: o\nteacher: {model: t}\nstudent: {model: s}\ndata: {train: d.jsonl}\n"
        "algorithm: {divergence: jsd, divergence_args: {beta: 0.3}}\ntraining: {num_steps: 7}\n",
    )
    config = load_config(path, ["--training.num_steps=9", "--algorithm.divergence_args.beta=0.2"])
    assert config.training.num_steps == 9
    assert config.algorithm.divergence_args == {"beta": 0.2}
    assert config.training.samples_per_step == TrainingConfig().samples_per_step


def test_several_teachers(tmp_path: Path) -> None:
    text = (
        "output_dir: o\nstudent: {model: s}\nteachers:\n"
        "  math: {model: m, tp_size: 2, engine_args: {mem_fraction_static: 0.5}}\n  code: {model: c}\n"
        "data: {train: [{source: a.jsonl, teacher: math}, b.jsonl], teacher_column: expert}\n"
    )
    path = write(tmp_path, text)
    config = load_config(path, ["--teachers.code.num_workers=3"])
    math = TeacherConfig("m", tp_size=2, engine_args={"mem_fraction_static": 0.5})
    assert config.named_teachers() == {"math": math, "code": TeacherConfig("c", num_workers=3)}
    assert config.data.train_sources() == [DataSource("a.jsonl", teacher="math"), DataSource("b.jsonl")]
    assert load_config(write(tmp_path, dump_config(config))) == config
    assert load_config(None, MINIMAL).named_teachers() == {"": TeacherConfig("t")}


def test_options_that_several_share(tmp_path: Path) -> None:
    text = "output_dir: o\nstudent: {model: s}\ndata: {train: d}\nteachers: {a: &t {model: t}, b: {<<: *t, model: u}}\n"
    config = load_config(write(tmp_path, text))
    assert config.teachers == {"a": TeacherConfig("t"), "b": TeacherConfig("u")}


@pytest.mark.parametrize("section", ["profile: false", "optimizer: [{eps: 1}]", "training: 3", "observe: 3"])
def test_a_section_that_is_none(tmp_path: Path, section: str) -> None:
    text = f"output_dir: o\nstudent: {{model: s}}\ndata: {{train: d}}\n{section}\n"
    with pytest.raises(ConfigError, match=f"{section.partition(':')[0]}: expected options by name, got "):
        load_config(write(tmp_path, text))


def test_an_option_without_a_value_keeps_its_default(tmp_path: Path) -> None:
    text = (
        "output_dir: o\nteacher:\nstudent: {model: s, lora: , num_ranks: }\ntraining:\ndata: {train: d, loss_roles: }\n"
    )
    assert load_config(write(tmp_path, text)) == load_config(
        None, ["--teacher.model=", *MINIMAL[:1], *MINIMAL[2:3], "--data.train=d"]
    )


def test_lists_grow_by_options() -> None:
    config = load_config(None, [*MINIMAL, "--data.loss_roles=[assistant]", "--data.loss_roles+=tool"])
    assert list(config.data.loss_roles) == ["assistant", "tool"]


def test_dump_reads_back(tmp_path: Path) -> None:
    config = load_config(None, [*MINIMAL, "--optimizer.betas=[0.8,0.9]"])
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    "options, message",
    [
        (["--trainin.num_steps=1"], 'unknown option "trainin.num_steps"; did you mean "training.num_steps"'),
        (["--training.num_step=1"], 'did you mean "training.num_steps"'),
        (["--training.num_steps=many"], "training.num_steps"),
        (["--teacher.dtype=float8"], "teacher.dtype"),
        (["--training.num_steps=-1"], "training.num_steps: expected at least 0, got -1"),
        (["--algorithm.temperature=0"], "algorithm.temperature: expected more than 0"),
        (["--training.tokens_per_microbatch=100"], "expected at least 1024, got 100"),
        (["--student.num_ranks=9"], "training.samples_per_step: expected at least 9"),
        (["--optimizer.min_lr_ratio=2"], "between 0 and 1"),
        (["--optimizer.betas=[0.9,1.5]"], "optimizer.betas: expected two of at least 0 and below 1"),
        (["--optimizer.weight_decay=-1"], "optimizer.weight_decay: expected at least 0"),
        (["--optimizer.eps=-1"], "optimizer.eps: expected at least 0"),
        (["--algorithm.chunk_size=0"], "algorithm.chunk_size: expected at least 1, got 0"),
        (["--student.router_aux_loss_coef=-3"], "student.router_aux_loss_coef: expected at least 0"),
        (["--output_dir="], "output_dir: expected a folder, got ''"),
        (["--seed=-1"], "seed: expected at least 0, got -1"),
        ([f"--seed={2**63}"], "seed: expected less than 2^63"),
        (
            ["--transport.num_slots=40000", "--student.num_ranks=2"],
            "transport.num_slots: expected at most 32768, got 40000",
        ),
        (["--training.keep_last=0"], "training.keep_last: expected at least 1"),
        (["--training.keep_best=true", "--data.num_eval_samples=0"], "data.num_eval_samples is 0"),
        (["--resume=true", "--overwrite=true"], "exclude each other"),
        (["--teacher.num_workers=0"], "teacher.num_workers: expected at least 1, got 0"),
        (["--teachers={math: {model: m}}"], "teacher and teachers exclude each other"),
        (["--teacher.model=", "--teachers={math: {}}"], "teachers.math.model: expected a folder or hub id"),
        (["--teacher.model=", "--teachers={a.b: {model: m}}"], "expected names of letters, digits, _ and -, got 'a.b'"),
        (
            ["--teacher.model=", f"--teachers={{{'é' * 20}: {{model: m}}}}"],
            "expected names of at most 38 bytes, got éé",
        ),
        (["--teacher.model=", "--teachers={a: {model: m, tp_size: 0}}"], "teachers.a.tp_size: expected at least 1"),
        (
            ["--teacher.backend=base", "--teacher.model="],
            "base: student.lora.rank: expected more than 0, got 0",
        ),
        (
            ["--teacher.backend=base", "--teacher.model=s", "--student.lora.rank=4", "--student.vocab_parallel=true"],
            "context_parallel or vocab_parallel of the student: expected neither",
        ),
        (["--student.num_ranks=2", "--student.context_parallel=3"], "expected a divisor of the 2 ranks, got 3"),
        (["--student.num_ranks=4", "--student.replicate=3"], "student.replicate: expected a divisor of the 4 ranks"),
        (
            ["--student.num_ranks=2", "--student.context_parallel=2", "--transport.schedule=colocate"],
            "use overlap, or context_parallel 1",
        ),
        (["--teachers.math.modle=m"], 'unknown option "teachers.math.modle"; did you mean "teacher.model"'),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(None, [*MINIMAL, *options])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("teacher: {modle: t}\n", 'unknown option "teacher.modle"; did you mean "teacher.model"'),
        ("data: {train: [{source: a, wieght: 2}]}\n", 'option "data.train.wieght"; did you mean "data.train.weight"'),
        ("seed: 1\nteacher:\n  model: a\n  model: b\n", 'run.yaml, line 4: "model" is there twice: give it once'),
        ("techer: {model: t}\n", 'did you mean "teacher"'),
        ("teachers: {m: {modle: t}}\n", 'unknown option "teachers.m.modle"; did you mean "teacher.model"'),
        ("student: {lora: {rnk: 4}}\n", 'unknown option "student.lora.rnk"; did you mean "student.lora.rank"'),
        ("- a\n", "expected options by name, got list"),
        ("teacher: {model: [\n", "not valid YAML"),
        ("output_dir: o\n", "required: student.model, data.train"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, text))
    assert message in str(error.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        load_config(tmp_path / "none.yaml")


def test_options_are_documented() -> None:
    """Every option's help comes from its docstring; one without is a hole in `--help`."""
    from kdflow.config_file import config_parser

    text = config_parser().format_help()
    names = option_names()
    for name in names:
        is_section = any(other.startswith(f"{name}.") for other in names)
        if "." in name and not is_section:
            at = text.index(f"--{name} ", text.index("options:"))
            following = text[at:].split("\n  --", 1)[0]
            assert "(type:" in following or "(required" in following, name
            assert len(following.split("(")[0].split()) > 2, f"{name} has no description"
