"""The data section: several sources, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdflow.config import DataSource, RunConfig
from kdflow.config_file import dump_config, load_config
from kdflow.errors import ConfigError

MINIMAL = ["--output_dir=o", "--teacher.model=t", "--student.model=s"]


def load(*options: str) -> RunConfig:
    return load_config(None, [*MINIMAL, *(f"--data.{option}" for option in options)])


def test_sources_from_file_and_command_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  train:\n    - {source: a.jsonl, weight: 3}\n    - b.jsonl\n", encoding="utf-8")
    expected = [DataSource("a.jsonl", 3.0), DataSource("b.jsonl", 1.0)]
    config = load_config(path, MINIMAL)
    assert config.data.train_sources() == expected
    assert load('train=[{"source": "a.jsonl", "weight": 3}, b.jsonl]').data == config.data
    assert load("train=c.jsonl").data.train_sources() == [DataSource("c.jsonl", 1.0)]
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config


@pytest.mark.parametrize(
    "options, message",
    [
        (['train=[{"source": "a", "weight": 0}]'], "weight of a: expected more than 0, got 0"),
        (['train=[{"source": "a", "weight": -1.5}, b]'], "weight of a: expected more than 0, got -1.5"),
        (['train=[{"source": "a", "weight": .inf}]'], "weight of a: expected more than 0, got inf"),
        (['train=[{"source": "a", "wieght": 2}]'], "expected a source or a list of {source, weight}"),
        (["train=[]"], "expected a source or a list of {source, weight}"),
        (["train="], "expected a source or a list of {source, weight}"),
        (["train=[a, b, a]"], "a is there twice: give it once, with the sum of the weights"),
        (["train=a", "loss_roles=[]"], "data.loss_roles: expected at least one role"),
        (["train=a", "loss_turns=first"], "loss_turns"),
        (["train=a", "long_samples=drop"], "long_samples"),
        (["train=a", "long_samples=split", "teacher_context=Hm."], "data.long_samples: split.*use truncate or skip"),
    ],
)
def test_bad_options(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*options)


def test_unknown_key_of_a_source_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  train:\n    - {source: a.jsonl, wieght: 3}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="wieght"):
        load_config(path, MINIMAL)
