"""What the documents quote is what the stored files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import overview
from bench.client import ROOT
from bench.output import markdown, read_results

RESULTS = ROOT / "docs" / "results.md"
README = ROOT / "README.md"


def quoted_files() -> list[str]:
    return sorted(set(re.findall(r"bench/results/[\w-]+\.jsonl", RESULTS.read_text())))


@pytest.mark.parametrize("file", quoted_files())
def test_a_quoted_file_is_quoted_to_the_letter(file: str) -> None:
    text = RESULTS.read_text()
    for block in markdown(*read_results(ROOT / file)).split("\n\n"):
        assert block in text, f"docs/results.md: put in what `python -m bench show {file}` prints"


def test_the_readmes_table_is_of_the_stored_files() -> None:
    assert overview.table() in README.read_text(), "README.md: put in what `python -m bench overview` prints"


@pytest.mark.parametrize("document", [RESULTS, README], ids=lambda path: path.name)
def test_every_picture_is_there(document: Path) -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document.read_text())
    assert pictures
    for picture in pictures:
        assert (document.parent / picture).read_bytes().startswith(b"\x89PNG"), picture


def test_the_overview_shows_every_provider_of_its_cases() -> None:
    figure = overview.draw()
    words = [text.get_text() for axes in figure.axes for text in axes.get_yticklabels()]
    for _, file, name in overview.LOSS_CASES:
        providers = [row.provider for row in read_results(ROOT / "bench" / "results" / file)[1] if row.case == name]
        assert providers
        assert set(providers) <= set(words)
