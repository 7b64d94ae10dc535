"""Tokenised samples of a run: each source is read once into a store, and from there on any sample is at hand."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kdflow.config import DataConfig, DataSource
from kdflow.data.chat import Chat, ChatTokenizer
from kdflow.data.conversation import read_row
from kdflow.data.mixture import Mixture, apportion
from kdflow.data.progress import told
from kdflow.data.report import DatasetReport
from kdflow.data.shorten import fit, pair
from kdflow.data.sources import Row, open_source
from kdflow.data.store import FORMAT, SampleView, StoreWriter, TokenStore, open_or_write
from kdflow.data.teachers import check_all_used, teacher_of_source
from kdflow.errors import DataError
from kdflow.types import Sample

_ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Dataset:
    """
    Attributes:
        samples: of all sources, and in which order a run draws them.
        report: of all sources together.
        digests: of the stores' contents, by source: with other ones a run would not be the same.
        stores: folders of the token stores, by source.
    """

    samples: Mixture
    report: DatasetReport
    digests: dict[str, str]
    stores: dict[str, Path]


def load_datasets(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    teachers: Sequence[str] = ("",),
    *,
    say: Callable[[str], None] = lambda text: None,
    stores: Mapping[str, Path] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """The training set and the held-out set (None where `num_eval_samples` is 0).

    Args:
        teachers: names of those from which samples learn.
        say: told of each source that is tokenised, and how far it is.
        stores: of both sets, as another process opened them: sources are not read then, and the samples are the same
            whatever they would yield by now.

    Raises:
        DataError: a source is missing, empty or unusable; samples and teachers do not fit one another.
    """
    chat = ChatTokenizer(tokenizer, loss_roles=config.loss_roles, loss_turns=config.loss_turns)

    def open_store(source: str) -> TokenStore:
        return _open_store(source, config, chat, say) if stores is None else TokenStore(stores[source])

    sources = config.train_sources()
    parts = _open_parts(sources, open_store, config.teacher_column, teachers)
    check_all_used(teachers, {name or part.teacher for part in parts for name in part.store.first_rows_by_teacher()})
    if config.num_eval_samples == 0:
        return _dataset(sources, parts), None
    eval_sources = config.eval_sources() or sources
    shares = apportion([item.weight for item in eval_sources], config.num_eval_samples)
    if config.eval is not None:
        eval_parts = _open_parts(eval_sources, open_store, config.teacher_column, teachers)
        chosen = [
            part.only(_choose(part.store, n, seed), part.skipped) for part, n in zip(eval_parts, shares, strict=True)
        ]
        return _dataset(sources, parts), _dataset(eval_sources, chosen)
    kept, held_out = [], []
    for item, part, count in zip(sources, parts, shares, strict=True):
        chosen = _choose(part.store, count, seed)
        if len(chosen) == len(part):
            raise DataError(
                f"data: {item.source} has {len(np.unique(part.store.rows()))} usable rows, {count} of them to be held "
                "out: give data.eval or a smaller data.num_eval_samples"
            )
        held_out.append(part.only(chosen, {}))
        kept.append(part.only(np.setdiff1d(part.indices, chosen), part.skipped))
    return _dataset(sources, kept), _dataset(sources, held_out)


def _open_parts(
    sources: Sequence[DataSource],
    open_store: Callable[[str], TokenStore],
    teacher_column: str | None,
    teachers: Sequence[str],
) -> list[_Part]:
    parts, first_row = [], 0
    for item in sources:
        store = open_store(item.source)
        teacher = teacher_of_source(item, store, teacher_column, teachers)
        parts.append(_Part(store, np.arange(len(store)), first_row, teacher, store.report.skipped))
        first_row += store.report.num_rows
    return parts


def _choose(store: TokenStore, num_rows: int, seed: int) -> np.ndarray:
    """The samples of so many rows, by chance."""
    rows = np.unique(store.rows())
    chosen = np.random.default_rng(seed).permutation(len(rows))[:num_rows]
    return np.flatnonzero(np.isin(store.rows(), rows[chosen]))


def _dataset(sources: Sequence[DataSource], parts: Sequence[_Part]) -> Dataset:
    return Dataset(
        samples=Mixture(parts, [item.weight for item in sources]),
        report=DatasetReport.sum([part.report() for part in parts]),
        digests={item.source: part.store.digest for item, part in zip(sources, parts, strict=True)},
        stores={item.source: part.store.folder for item, part in zip(sources, parts, strict=True)},
    )


class _Part(SampleView):
    """Some samples of a store; their rows are counted on from those of the sources before.

    Args:
        teacher: of those whose rows name none.
        skipped: rows of the store that this part tells of, by reason.
    """

    def __init__(
        self, store: TokenStore, indices: np.ndarray, first_row: int, teacher: str, skipped: dict[str, int]
    ) -> None:
        self.store = store
        self.indices = indices
        self.first_row = first_row
        self.teacher = teacher
        self.skipped = skipped

    def only(self, indices: np.ndarray, skipped: dict[str, int]) -> _Part:
        return _Part(self.store, indices, self.first_row, self.teacher, skipped)

    def __len__(self) -> int:
        return len(self.indices)

    def get(self, index: int) -> Sample:
        sample = self.store.get(int(self.indices[index]))
        return replace(
            sample, sample_id=self.first_row + sample.sample_id, teacher_name=sample.teacher_name or self.teacher
        )

    def report(self) -> DatasetReport:
        return self.store.report_of(self.indices, self.skipped)


def _open_store(name: str, config: DataConfig, chat: ChatTokenizer, say: Callable[[str], None]) -> TokenStore:
    untold, cache = open_source(name), cache_folder(config)
    source = replace(untold, rows=lambda: told(untold.rows(), name, say))
    fingerprint = source.fingerprint()
    decides = {
        "format": FORMAT,
        "rows": fingerprint,
        "chat": chat.fingerprint(),
        "max_length": config.max_length,
        "long_samples": config.long_samples,
        "teacher_context": config.teacher_context,
        "teacher_column": config.teacher_column,
    }
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]

    def write(writer: StoreWriter) -> DatasetReport:
        say(f"data: {name} is tokenised, once: its tokens are kept in {cache}")
        return tokenize_rows(source.rows_of(fingerprint), chat, config, name, writer.add)

    return open_or_write(cache, key, write)


def cache_folder(config: DataConfig) -> Path:
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kdflow" / "tokens"


def tokenize_rows(
    rows: Iterable[Row], chat: ChatTokenizer, config: DataConfig, source: str, add: Callable[[Sample, bool], object]
) -> DatasetReport:
    """Tokenises rows and hands them to `add`, some at a time; those that cannot enter the loss are skipped and counted.

    Args:
        add: gets each sample, and whether its row was longer than `max_length`.

    Raises:
        DataError: there are no rows, or none can be used.
    """
    work = _Work(chat, config)
    numbered = enumerate(rows)
    first: Row = {}
    while chunk := list(islice(numbered, _ROWS_AT_A_TIME)):
        first = first or chunk[0][1]
        for sample, truncated in work.samples(chunk):
            add(sample, truncated)
    report = work.report()
    if report.num_rows == 0:
        raise DataError(f"data: {source} holds no rows")
    if report.num_samples == 0:
        columns = ", ".join(sorted(map(str, first))) or "none"
        hint = (
            ""
            if "messages" in first
            else f"; expected a column `messages`, and the columns of the first row are {columns}"
        )
        raise DataError(f"data: {source}: no row can be used ({report}){hint}")
    return report


@dataclass(frozen=True)
class _Rendered:
    """A row as text: `own` is what the teacher alone reads."""

    number: int
    student: Chat
    own: Chat | None
    teacher_name: str


class _Work:
    """Rows to samples, and what became of them."""

    def __init__(self, chat: ChatTokenizer, config: DataConfig) -> None:
        self._chat = chat
        self._config = config
        self._skipped: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    def samples(self, chunk: Sequence[tuple[int, Row]]) -> Iterator[tuple[Sample, bool]]:
        rendered = list(self._rendered(chunk))
        # The student's text of each, then the teacher's of those that have one of their own.
        chats = [r.student for r in rendered] + [r.own for r in rendered if r.own is not None]
        numbers = [r.number for r in rendered] + [r.number for r in rendered if r.own is not None]
        tokenized = self._chat.tokenize(chats, numbers) if chats else []
        teachers = iter(tokenized[len(rendered) :])
        for row, student in zip(rendered, tokenized, strict=False):
            teacher = None if row.own is None else next(teachers)
            try:
                whole = pair(student, teacher)
                pieces = list(fit(whole, self._config.max_length, self._config.long_samples))
            except DataError as error:
                self._skipped[str(error)] += 1
                continue
            truncated = whole.longest > self._config.max_length
            self._counts["truncated"] += truncated
            for piece in pieces:
                self._counts["samples"] += 1
                self._counts["tokens"] += len(piece)
                self._counts["loss_tokens"] += piece.num_loss_tokens
                yield replace(piece, teacher_name=row.teacher_name), truncated

    def _rendered(self, chunk: Sequence[tuple[int, Row]]) -> Iterator[_Rendered]:
        for number, row in chunk:
            self._counts["rows"] += 1
            try:
                told = read_row(row, self._config.teacher_context, self._config.teacher_column)
                student = self._chat.render(told.messages, told.tools)
                own = None
                if told.teacher_messages is not None:
                    own = self._chat.render(told.teacher_messages, told.tools)
            except DataError as error:
                self._skipped[str(error)] += 1
                continue
            yield _Rendered(number, student, own, told.teacher_name)

    def report(self) -> DatasetReport:
        return DatasetReport(
            num_rows=self._counts["rows"],
            num_samples=self._counts["samples"],
            num_tokens=self._counts["tokens"],
            num_loss_tokens=self._counts["loss_tokens"],
            num_truncated=self._counts["truncated"],
            skipped=dict(self._skipped),
        )
