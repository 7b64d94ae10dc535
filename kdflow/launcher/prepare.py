"""Everything that can be wrong with a run and be known before a model is loaded."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kdflow.algorithms import ALGORITHMS, Algorithm, ModelInfo
from kdflow.config import RunConfig, TeacherConfig, teacher_option
from kdflow.config_file import dump_config, load_config
from kdflow.data import Dataset, load_datasets
from kdflow.errors import ConfigError
from kdflow.modeling import (
    check_decoder,
    check_positions,
    load_model_config,
    load_tokenizer,
    resolve_device,
    resolve_dtype,
)
from kdflow.observe import check_wandb
from kdflow.teacher import TEACHERS
from kdflow.tracing import FOLDER

CONFIG_FILE = "config.yaml"
LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
# What a run writes into its folder, and so what `overwrite` deletes; the config, by which it is known as a run's, stays
# until the new one takes its place.
RUN_ENTRIES = (
    "metrics.jsonl",
    "tensorboard",
    "wandb",
    CHECKPOINTS,
    "logs",
    "model",
    "writing-model",
    "removing-model",
    "exports",
    FOLDER,
)


@dataclass(frozen=True)
class Prepared:
    """A run that was looked over.

    Attributes:
        algorithms: of each teacher, by name; fits the pair of models.
        uses_teacher: whether the algorithm needs their hidden states.
        tokenizer: the student's.
        train, held_out: tokenised.
        slot_bytes: room for the hidden states of the largest microbatch of the widest teacher; 0 where none is started.
    """

    config: RunConfig
    algorithms: dict[str, Algorithm]
    uses_teacher: bool
    tokenizer: Any
    train: Dataset
    held_out: Dataset | None
    slot_bytes: int

    @property
    def stores(self) -> dict[str, Path]:
        """Of the tokens of both sets, by source."""
        return {**self.train.stores, **(self.held_out.stores if self.held_out is not None else {})}

    @property
    def starts_teachers(self) -> bool:
        """Whether there are teachers with processes of their own."""
        return self.uses_teacher and not self.config.teacher.is_base


def prepare(
    config: RunConfig, say: Callable[[str], None] = lambda text: None, stores: Mapping[str, Path] | None = None
) -> Prepared:
    """Checks names, models, vocabularies and data, and tokenises.

    Args:
        say: told of what takes long, and of what may not go well.
        stores: of tokens, by source, where another process has prepared them.

    Raises:
        ConfigError, DataError: the first thing that is wrong.
    """
    check_wandb(config.observe)
    resolve_device(config.student.device)
    teachers = config.named_teachers()
    make_algorithm = ALGORITHMS.get(config.algorithm.name)
    uses_teacher = make_algorithm.uses_teacher
    for teacher in teachers.values():
        if not teacher.is_base:
            backend = TEACHERS.get(teacher.backend)
            if uses_teacher:
                backend.check(teacher, sleeps=config.transport.schedule == "colocate")
    if uses_teacher and not all(teacher.model or teacher.is_base for teacher in teachers.values()):
        raise ConfigError(
            f"teacher.model: algorithm {config.algorithm.name} learns from a teacher, and none is given; name its "
            "folder or hub id (algorithm sft learns from text alone)"
        )
    started = {name: teacher for name, teacher in teachers.items() if uses_teacher and not teacher.is_base}
    student_tokenizer, student = _model_info(config.student.model)
    check_decoder(load_model_config(config.student.model), "student.model")

    def teacher_info(name: str, teacher: TeacherConfig) -> ModelInfo | None:
        if not uses_teacher:
            return None
        return student if teacher.is_base else _teacher_info(name, teacher)

    algorithms = {
        name: make_algorithm(config.algorithm, student=student, teacher=teacher_info(name, teacher))
        for name, teacher in teachers.items()
    }
    if config.student.vocab_parallel:
        _check_cut_heads(algorithms.values())
    for model in dict.fromkeys([config.student.model, *(teacher.model for teacher in started.values())]):
        warning = check_positions(load_model_config(model), config.data.max_length, f"{model}: data.max_length")
        if warning is not None:
            say(f"warning: {warning}")
    train, held_out = load_datasets(
        config.data, student_tokenizer, config.seed, tuple(teachers), say=say, stores=stores
    )
    row_bytes = max(map(_row_bytes, started.values()), default=0)
    return Prepared(
        config=config,
        algorithms=algorithms,
        uses_teacher=uses_teacher,
        tokenizer=student_tokenizer,
        train=train,
        held_out=held_out,
        slot_bytes=config.training.tokens_per_microbatch * row_bytes,
    )


def _check_cut_heads(algorithms: Iterable[Algorithm]) -> None:
    for what in filter(None, (algorithm.needs_whole_rows for algorithm in algorithms)):
        raise ConfigError(
            f"student.vocab_parallel: {what} needs whole rows, and with cut heads a rank has its own tokens alone; "
            "choose a sum over the vocabulary, such as forward_kl or jsd, or leave the option out"
        )


def _row_bytes(teacher: TeacherConfig) -> int:
    text_config = load_model_config(teacher.model).get_text_config()
    dtype = resolve_dtype(teacher.dtype, resolve_device(teacher.device))
    return text_config.hidden_size * dtype.itemsize


def _teacher_info(name: str, teacher: TeacherConfig) -> ModelInfo:
    try:
        info = _model_info(teacher.model)[1]
    except ConfigError as error:
        raise ConfigError(f"{teacher_option(name)}: {error}") from None
    if teacher.backend == "hf":
        check_decoder(load_model_config(teacher.model), f"{teacher_option(name)}.model")
    return replace(info, name=f"{name} ({info.name})" if name else info.name)


def _model_info(model: str) -> tuple[Any, ModelInfo]:
    text_config = load_model_config(model).get_text_config()
    tokenizer = load_tokenizer(model)
    return tokenizer, ModelInfo(model, tokenizer.get_vocab(), text_config.vocab_size)


@contextmanager
def locked_output(config: RunConfig) -> Iterator[None]:
    """Makes the output folder and keeps it for this process; the kernel lets go of it when the process is gone.

    Raises:
        ConfigError: another run is writing there, or the folder cannot be made.
    """
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK_FILE).open("a")
    except OSError as error:
        raise ConfigError(f"output_dir: {folder} cannot be written ({error}); choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"output_dir: another run is writing to {folder}; wait for its end, or choose another folder"
            ) from None
        except OSError:  # a filesystem without locks: two runs in one folder are the user's to avoid there
            pass
        yield


def check_output(config: RunConfig) -> None:
    """
    Raises:
        ConfigError: the folder holds a run and neither `resume` nor `overwrite` is set; or `resume` is and the run
            there is another one; or the run would write where it reads.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir: expected a folder, got the file {folder}; choose another name")
    old = folder / CONFIG_FILE
    if config.resume:
        if not old.is_file():
            raise ConfigError(f"resume: {folder} holds no run with a {CONFIG_FILE}; start without --resume")
        _check_same_run(load_config(old), config, folder)
    elif holds_run(folder) and not config.overwrite:
        raise ConfigError(
            f"output_dir: {folder} holds a run; add --resume=true to go on with it, "
            "--overwrite=true to replace it, or choose another folder"
        )
    _check_kept(config, folder)


def open_output(config: RunConfig) -> Path:
    """Makes the output folder, without the run that it holds where that is to be overwritten.

    Raises:
        ConfigError: as `check_output`.
    """
    check_output(config)  # again: it is locked only now
    folder = Path(config.output_dir)
    if holds_run(folder) and not config.resume:
        for name in RUN_ENTRIES:
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    return folder


def holds_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() or (folder / CHECKPOINTS).is_dir()


def _check_kept(config: RunConfig, folder: Path) -> None:
    """That nothing of what the run reads is where it writes."""
    given = {"student.model": [config.student.model], "data.cache_dir": [config.data.cache_dir or ""]}
    given |= {f"{teacher_option(name)}.model": [teacher.model] for name, teacher in config.named_teachers().items()}
    given["data.train"] = [item.source for item in config.data.train_sources()]
    given["data.eval"] = [item.source for item in config.data.eval_sources()]
    written = [root / name for root in (folder.absolute(), folder.resolve()) for name in (*RUN_ENTRIES, CONFIG_FILE)]
    for option, values in given.items():
        for value in filter(None, values):
            path = Path(value.split(":")[0]).expanduser()
            # Of what lies behind a link only the link would be deleted.
            names = (path.absolute(), path.resolve())
            if path.exists() and any(name.is_relative_to(entry) for name in names for entry in written):
                raise ConfigError(
                    f"output_dir: {option} is {value}, which lies in what the run writes in {folder}, or deletes of an "
                    "earlier one; move it away, or choose another output_dir"
                )


def write_config(config: RunConfig, folder: Path) -> None:
    """The resolved config of the run in this folder, whole or not at all; how it was started is no part of it."""
    aside = folder / f"{CONFIG_FILE}.writing"
    aside.write_text(dump_config(replace(config, resume=False, overwrite=False)), encoding="utf-8")
    aside.rename(folder / CONFIG_FILE)


def _check_same_run(old: RunConfig, new: RunConfig, folder: Path) -> None:
    """The data position counts samples of one order: what decides the order must not change."""
    pairs = {
        "student.model": (old.student.model, new.student.model),
        "data": (replace(old.data, cache_dir=None), replace(new.data, cache_dir=None)),
        "training.samples_per_step": (
            old.training.samples_per_step,
            new.training.samples_per_step,
        ),
        "seed": (old.seed, new.seed),
    }
    for name, (before, now) in pairs.items():
        if before != now:
            raise ConfigError(f"resume: {name} was {before} in {folder}, now it is {now}")
