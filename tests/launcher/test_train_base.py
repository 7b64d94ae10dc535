"""`teacher.backend: base` end to end beside a teacher process that holds the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdflow.config_file import dump_config
from kdflow.errors import ConfigError
from support.processes import Spawned
from support.run import metrics_of

pytest.importorskip("peft")


def test_base_equals_a_teacher_process(run_config, tiny: Path, tmp_path: Path) -> None:
    options = {
        "student__lora__rank": 4,
        "student__compute_dtype": "float32",
        "data__teacher_context": "Answer as a pirate would.",
        "data__max_length": 160,
        "training__eval_every": 2,
    }
    teachers = {
        "base": {"teacher__backend": "base", "teacher__model": ""},
        "hf": {"teacher__model": tiny / "student", "teacher__dtype": "float32"},
    }
    configs = [run_config(output_dir=tmp_path / name, **options, **own) for name, own in teachers.items()]
    files = [Path(config.output_dir).with_suffix(".yaml") for config in configs]
    for config, file in zip(configs, files, strict=True):
        file.write_text(dump_config(config), encoding="utf-8")
    assert Spawned("support.killed:run_to_their_ends", *map(str, files)).join() == 0
    for kind, names in (("train", ("loss", "kd_loss", "grad_norm")), ("eval", ("kl", "ce_loss"))):
        for name in names:
            found = [[m[name] for m in metrics_of(config, kind)] for config in configs]
            assert len(found[0]) > 2
            assert found[0] == pytest.approx(found[1], rel=1e-4), name
    assert not list(Path(configs[0].output_dir, "logs").glob("teacher*"))
    kl = [m["kl"] for m in metrics_of(configs[0], "eval")]
    assert kl[-1] < 0.9 * kl[0], "the student did not take the context in"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher__model": ""}, r"student\.lora\.rank: expected more than 0, got 0"),
        ({"student__lora__rank": 2}, r"teacher\.model: expected nothing, as the teacher is student\.model"),
    ],
)
def test_what_base_needs(run_config, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_config(teacher__backend="base", **options)
