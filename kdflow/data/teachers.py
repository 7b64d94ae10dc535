"""Which teacher each sample learns from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from kdflow.config import DataSource
from kdflow.data.store import TokenStore
from kdflow.errors import DataError
from kdflow.registry import nearest


def teacher_of_source(item: DataSource, store: TokenStore, column: str | None, known: Sequence[str]) -> str:
    """The teacher of those samples whose rows name none; empty where all of them do.

    Args:
        column: that names it in a row.
        known: names of the run's teachers; an only one need not be named.

    Raises:
        DataError: source or row name one that there is not, or neither names any.
    """
    if item.teacher:
        _check_known(item.teacher, f"data: {item.source}", known)
    own = item.teacher or (known[0] if len(known) == 1 else "")
    for name, row in store.first_rows_by_teacher().items():
        if name:
            _check_known(name, f"data: {item.source}: row {row + 1}, column `{column}`", known)
        elif own not in known:
            raise DataError(
                f"data: {item.source}: row {row + 1} names no teacher, and there are {_listed(known)}; give the source "
                "one (a list of {source, teacher}), or every row in a column that data.teacher_column names"
            )
    return own


def check_all_used(known: Iterable[str], used: Iterable[str]) -> None:
    """
    Raises:
        DataError: a teacher from which no sample learns.
    """
    if unused := sorted({*known} - {*used}):
        raise DataError(f"teachers.{unused[0]}: no sample of data.train learns from it; name it there or take it out")


def _check_known(name: str, where: str, known: Sequence[str]) -> None:
    if name in known:
        return
    if known == ("",):
        raise DataError(f"{where}: unknown teacher {name!r}; the run's only one has no name: give it one in teachers")
    raise DataError(f"{where}: unknown teacher {name!r}{nearest(name, known)} (known: {_listed(known)})")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
