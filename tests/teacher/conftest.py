"""Real engines on tiny models; where SGLang is not installed its tests are skipped (`make test-sglang` has it)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from support.sglang import make_model


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model of support/sglang.py by name, made once."""
    base = tmp_path_factory.getbasetemp() / "sglang-models"
    base.mkdir(exist_ok=True)

    def get(name: str) -> Path:
        folder = base / name
        with FileLock(f"{folder}.lock"):
            return folder if folder.exists() else make_model(name, folder)

    return get
