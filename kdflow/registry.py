"""Named implementations, loaded on first use."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from kdflow.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint `did you mean "x"?` with the nearest known name, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f'; did you mean "{match[0]}"?' if match else ""


class Registry(Generic[T]):
    """Maps names to classes of one kind (`teacher`, `algorithm`).

    `builtin` gives the module of each name that kdflow ships; it is imported only
    when the name is asked for, so that unused engines cost nothing. Anybody adds
    one with `@registry.register("name")` in a module of his own.
    """

    def __init__(self, kind: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self._builtin = builtin
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator that adds an entry.

        Raises:
            ValueError: the name is taken.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f'{self.kind} "{name}" is already registered')
            self._entries[name] = entry
            return entry

        return add

    def names(self) -> list[str]:
        return sorted({*self._builtin, *self._entries})

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            ConfigError: there is none; the message lists the known names.
        """
        if name not in self._entries and name in self._builtin:
            importlib.import_module(self._builtin[name])
        if name not in self._entries:
            known = self.names()
            raise ConfigError(f'unknown {self.kind} "{name}"{nearest(name, known)} (known: {", ".join(known)})')
        return self._entries[name]
