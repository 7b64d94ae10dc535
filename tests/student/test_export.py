"""Models that find no room, or a name that is taken: there is a whole one or none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdflow.config import LoraConfig, StudentConfig
from kdflow.errors import CheckpointError
from kdflow.modeling import load_tokenizer
from kdflow.student import CheckpointFolder, CheckpointStore, FSDP2Student, export_checkpoint, export_model
from support.disk import room
from support.ranks import run_on_ranks
from support.student import make_student


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def move(student: FSDP2Student) -> None:
    with torch.no_grad():
        for weight in student.model.parameters():
            weight.add_(0.5)


def export_without_room(folder: Path, output: Path) -> str:
    """A model, another one that finds no room in place of it, and again with room; how it was told of."""
    student = make_student(str(folder / "student"), str(folder / "teacher"))
    tokenizer = load_tokenizer(str(folder / "student"))
    export_model(student, tokenizer, output)
    before = contents(output)
    move(student)
    with room(50_000), pytest.raises(CheckpointError) as error:
        export_model(student, tokenizer, output)
    assert contents(output) == before
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    torch.distributed.barrier()
    export_model(student, tokenizer, output)
    return str(error.value)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_model_of_a_run_is_replaced_by_a_whole_one_alone(tiny: Path, tmp_path: Path, num_ranks: int) -> None:
    output = tmp_path / "run" / "model"
    told = run_on_ranks(num_ranks, tmp_path / "ranks", export_without_room, tiny, output)
    for text in told:
        assert text.startswith(f"{output} was not written (")
        assert "File too large" in text
        assert text.endswith(f"make room, and `kdflow export {output.parent}` writes the model")
    assert len(set(told)) == 1
    assert [p.name for p in output.parent.iterdir()] == ["model"]
    start = AutoModelForCausalLM.from_pretrained(tiny / "student", dtype=torch.float32).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(output).state_dict().items():
        assert torch.equal(weight, (start[name] + 0.5).bfloat16()), name


def export_long_tokenizer(folder: Path, output: Path) -> None:
    student = make_student(str(folder / "student"), str(folder / "teacher"))
    tokenizer = load_tokenizer(str(folder / "student"))
    tokenizer.add_tokens([f"token-{number}" for number in range(10_000)])
    with room(1_000_000), pytest.raises(CheckpointError, match=r"was not written \(File too large"):
        export_model(student, tokenizer, output)


def test_a_tokenizer_that_finds_no_room(tiny: Path, tmp_path: Path) -> None:
    """The weights are written by then."""
    output = tmp_path / "run" / "model"
    run_on_ranks(1, tmp_path / "ranks", export_long_tokenizer, tiny, output)
    assert not list(output.parent.iterdir())


def export_adapters(folder: Path, output: Path) -> None:
    lora = LoraConfig(rank=4, target_modules=["q_proj"])
    student = make_student(str(folder / "student"), str(folder / "teacher"), lora=lora)
    tokenizer = load_tokenizer(str(folder / "student"))
    export_model(student, tokenizer, output)
    before = contents(output)
    assert "adapter/adapter_model.safetensors" in before
    for name in ("writing-model", "removing-model", "model"):  # of processes that were killed, and of the user
        (output.parent / name).mkdir(exist_ok=True)
        (output.parent / name / "old.txt").touch()
    with room(2_000), pytest.raises(CheckpointError, match="was not written"):
        export_model(student, tokenizer, output)  # there is no room for the adapter either
    assert contents(output) == before | {"old.txt": b""}
    export_model(student, tokenizer, output)
    assert contents(output) == before


def test_adapters_are_replaced_with_the_model(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    output = tmp_path / "run" / "model"
    run_on_ranks(1, tmp_path / "ranks", export_adapters, tiny, output)
    assert [p.name for p in output.parent.iterdir()] == ["model"]


def save(folder: Path, store: Path) -> None:
    student = make_student(str(folder / "student"), str(folder / "teacher"))
    checkpoints = CheckpointStore(store, student)
    checkpoints.save(1)
    checkpoints.wait()
    checkpoints.close()


@pytest.fixture
def job(tiny: Path, tmp_path: Path) -> tuple[Path, StudentConfig]:
    """A checkpoint and the student that it is of."""
    run_on_ranks(1, tmp_path / "ranks", save, tiny, tmp_path / "store")
    return CheckpointFolder(tmp_path / "store").find(None).path, StudentConfig(str(tiny / "student"))


def test_an_export_into_a_file_is_refused(job: tuple[Path, StudentConfig], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match=r"file cannot be used \(Not a directory\): choose another --output"):
        export_checkpoint(*job, file)
    with pytest.raises(CheckpointError, match=r"below was not written \(.*Not a directory"):
        export_checkpoint(*job, file / "below")
    assert file.read_text() == "mine"


def test_an_export_without_room_leaves_nothing(
    job: tuple[Path, StudentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    (folder / "empty").mkdir(parents=True)
    for name in ("new", "empty"):
        with room(50_000), pytest.raises(CheckpointError, match=r"was not written \(.*File too large"):
            export_checkpoint(*job, folder / name)
    assert [p.name for p in folder.rglob("*")] == ["empty"]
    monkeypatch.chdir(folder / "empty")
    export_checkpoint(*job, Path("."))
    assert AutoModelForCausalLM.from_pretrained(folder / "empty").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder / "empty").chat_template
