"""Who may import whom: the rules of docs/design/architecture.md, read from the sources."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEAVES = {"kdflow.types", "kdflow.config", "kdflow.errors", "kdflow.registry", "kdflow.tracing"}
DATA, TRANSPORT, MODELING = "kdflow.data", "kdflow.transport", "kdflow.modeling"

# What modules of a package may import of kdflow, besides their own package.
ALLOWED = {
    "kdflow.types": set(),
    "kdflow.errors": set(),
    "kdflow.registry": {"kdflow.errors"},
    "kdflow.config": {"kdflow.errors"},
    "kdflow.config_file": {"kdflow.config", "kdflow.errors", "kdflow.registry"},
    "kdflow.tracing": {"kdflow.config", "kdflow.errors"},
    DATA: LEAVES,
    TRANSPORT: LEAVES | {"kdflow._ring"},
    MODELING: LEAVES,
    "kdflow.algorithms": LEAVES | {DATA},
    "kdflow.teacher": LEAVES | {DATA, TRANSPORT, MODELING},
    "kdflow.student": LEAVES | {DATA, TRANSPORT, MODELING, "kdflow.algorithms"},
    "kdflow.training": LEAVES | {DATA},
    "kdflow.plan": LEAVES | {DATA, MODELING, "kdflow.algorithms", "kdflow.config_file"},
    "kdflow.observe": LEAVES | {"kdflow.training"},
}
# Engines are imported in one place each; the loss in those that compute with it.
ONLY_IN = {
    "sglang": {"kdflow/teacher/sglang", "kdflow/rollout/sglang"},
    "ray": {"kdflow/launcher/ray.py"},
    "wandb": {"kdflow/observe/wandb_recorder.py"},
    "kdflow_kernels": {"kdflow/algorithms/", "kdflow/student/fsdp2.py", "kdflow/training/", "kdflow/plan/"},
}


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if node.module == "kdflow" else {node.module}
    return found


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def sources() -> list[Path]:
    return sorted((ROOT / "kdflow").rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_kdflow_imports_follow_the_layers(path: Path) -> None:
    relative = path.relative_to(ROOT)
    own = package_of(".".join(relative.with_suffix("").parts))
    imported = imports_of(path)
    if own in ALLOWED:
        inner = {package_of(name) for name in imported if name.startswith("kdflow.")}
        assert inner <= ALLOWED[own] | {own}
    for name, places in ONLY_IN.items():
        if any(i.split(".")[0] == name for i in imported):
            assert any(str(relative).startswith(place) for place in places), name


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_import_torch_and_triton_only(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert roots - set(sys.stdlib_module_names) <= {"torch", "triton", "kdflow_kernels"}


def test_import_kdflow_is_light() -> None:
    code = (
        "import sys, kdflow; heavy = {'torch', 'sglang', 'ray', 'triton', 'transformers'}; "
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
