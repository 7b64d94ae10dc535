"""Fixtures of every test: few threads, no hub, tiny real models."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from filelock import FileLock

CACHE = tempfile.TemporaryDirectory(prefix="kdflow-tests-")
os.environ["XDG_CACHE_HOME"] = CACHE.name  # tokenised sources, of these processes and those that they start

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# Triton decides when it is first loaded whether its functions are interpreted, so it is loaded before any test can do
# it. What tests start shall not inherit the choice; those of the kernels make it again, see kernels/conftest.py.
with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ImportError):
    if not torch.cuda.is_available():
        patch.setenv("TRITON_INTERPRET", "1")
    import kdflow_kernels.jit_divergences
    import kdflow_kernels.row_kernels  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `teacher`, `student` and `conversations.jsonl`; made once for all workers."""
    from support.tiny import make_models

    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "tiny"
    with FileLock(str(folder) + ".lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            make_models(folder)
            (folder / "done").touch()
    return folder


@pytest.fixture
def run_config(tiny: Path, tmp_path: Path):
    """A function that makes the config of a small run; keywords are dotted options with `__`."""
    from kdflow.config import RunConfig
    from kdflow.config_file import load_config

    def make(**options: object) -> RunConfig:
        values: dict[str, object] = {
            "output_dir": tmp_path / "run",
            "teacher.model": tiny / "teacher",
            "student.model": tiny / "student",
            "data.train": tiny / "conversations.jsonl",
            "data.num_eval_samples": 4,
            "data.max_length": 128,
            "training.num_steps": 4,
            "training.samples_per_step": 4,
            "training.tokens_per_microbatch": 256,
            "optimizer.learning_rate": 3e-3,
            "teacher.num_threads": 1,
            "student.num_threads": 1,
            "transport.timeout_s": 60.0,
        }
        if "teachers" in options:  # in place of the one
            values = {name: value for name, value in values.items() if not name.startswith("teacher.")}
        values.update({name.replace("__", "."): value for name, value in options.items()})
        return load_config(None, [f"--{name}={value}" for name, value in values.items()])

    return make
