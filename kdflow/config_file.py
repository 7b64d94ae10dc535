"""Reads runs from YAML and the command line, and writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from kdflow.config import DataSource, RunConfig
from kdflow.errors import ConfigError
from kdflow.registry import nearest

_DICT_OPTIONS = ("algorithm.divergence_args", "teacher.engine_args")
_LIST_OPTIONS = ("data.train", "data.eval")  # of DataSource


def option_names(cls: type = RunConfig, prefix: str = "") -> list[str]:
    """Every dotted option of a config class."""
    names: list[str] = []
    hints = get_type_hints(cls)
    for item in fields(cls):
        names.append(prefix + item.name)
        if is_dataclass(kind := hints[item.name]) and isinstance(kind, type):
            names += option_names(kind, f"{prefix}{item.name}.")
    return names


def config_parser(prog: str = "kdflow train") -> Any:
    """A jsonargparse parser of `--config FILE` and every option of RunConfig."""
    from jsonargparse import ActionConfigFile, ArgumentParser  # pyright: ignore[reportPrivateImportUsage]

    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [RUN.yaml] [--OPTION.NAME=VALUE ...] [--print_config]",
        description="Distils a student from a teacher. Options of the command line win over the file.",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with these options")
    parser.add_class_arguments(RunConfig)
    return parser


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file and overrides such as `--training.num_steps=10`.

    Raises:
        ConfigError: a missing file, an unknown option (the nearest one is named), a value of
            the wrong type or out of range.
    """
    from jsonargparse import ArgumentError

    known = option_names()
    arguments = list(overrides)
    for argument in arguments:
        # jsonargparse's own endings: one more item of a list, and the options inside one.
        name = argument.split("=", 1)[0].removeprefix("--").removesuffix("+").removesuffix(".help")
        if argument.startswith("--") and name not in (*known, "config", "print_config"):
            _reject_unknown(name, known, "command line")
    if path is not None:
        _check_file(Path(path), known)
        arguments.insert(0, f"--config={path}")
    parser = config_parser()
    try:
        return _build(RunConfig, parser.parse_args(arguments).as_dict())
    except ArgumentError as error:
        raise ConfigError(f"{path or 'command line'}: {error}") from None


def _check_file(path: Path, known: Sequence[str]) -> None:
    import yaml

    if not path.is_file():
        raise ConfigError(f"config: no file {path}")

    class Loader(yaml.SafeLoader):
        """Refuses a key that is there twice, of which YAML would take the last."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            before = []
            for item, _ in node.value:
                if item.tag == "tag:yaml.org,2002:merge":
                    continue
                key = self.construct_object(item, deep)
                if key in before:
                    raise ConfigError(f'{path}, line {item.start_mark.line + 1}: "{key}" is there twice: give it once')
                before.append(key)
            return super().construct_mapping(node, deep)

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected options by name, got {type(values).__name__}")
    items = [f"{option}.{item.name}" for option in _LIST_OPTIONS for item in fields(DataSource)]
    for name in _dotted(values):
        _reject_unknown(name, [*known, *items], str(path))


def _dotted(values: dict[Any, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                yield from _dotted(part, f"{prefix}{key}.")


def _reject_unknown(name: str, known: Sequence[str], where: str) -> None:
    option = re.sub(r"^teachers\.[^.]*", "teacher", name)  # each has the options of the one
    inside_dict = any(option.startswith(f"{prefix}.") for prefix in _DICT_OPTIONS)
    if option not in known and not inside_dict:
        raise ConfigError(f'{where}: unknown option "{name}"{nearest(option, known)}')


def _build(cls: type, values: dict[str, Any]) -> Any:
    """What a file names without saying anything of it keeps its default."""
    hints = get_type_hints(cls)
    names = [item.name for item in fields(cls)]
    given = [name for name in names if values[name] is not None or NoneType in get_args(hints[name])]
    for name in given:
        if is_dataclass(hints[name]) and not isinstance(values[name], dict):
            raise ConfigError(f"{name}: expected options by name, got {values[name]!r}")
    return cls(**{name: _value(hints[name], values[name]) for name in given})


def _value(hint: Any, value: Any) -> Any:
    """Sections, alone or in a list, as their dataclasses."""
    if isinstance(value, dict) and isinstance(hint, type) and is_dataclass(hint):
        return _build(hint, value)
    if isinstance(value, dict) and get_origin(hint) is dict:
        return {name: _value(get_args(hint)[1], item) for name, item in value.items()}
    if isinstance(value, dict | list):
        for kind in get_args(hint):
            value = [_value(kind, item) for item in value] if isinstance(value, list) else _value(kind, value)
    return value


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads back."""
    import yaml

    values = asdict(config)
    values["optimizer"]["betas"] = list(config.optimizer.betas)
    return yaml.safe_dump(values, sort_keys=False)
