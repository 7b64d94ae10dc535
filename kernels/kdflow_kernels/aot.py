"""``python -m kdflow_kernels.aot``: compiles every kernel over rows ahead of time and prints what it takes. Needs no GPU.

For each architecture, divergence and option: registers a thread, bytes of shared memory, bytes spilled, and the widths of
the global loads and stores, read from the machine code.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

from kdflow_kernels.registers import next_allowance

ARCHITECTURES = (80, 90, 100)
DTYPES = {"bf16": 2, "fp32": 4}
COLUMNS = 152_064  # of a wide row
# What makes code of its own in the kernel, each alone; the first is the plain case.
OPTIONS: dict[str, dict[str, bool | str]] = {
    "plain": {},
    "ce": {"HAS_LABELS": True, "CE_GRADIENT": True},
    "ce, tempered": {"HAS_LABELS": True, "CE_GRADIENT": True, "TEMPERED": True},
    "padded": {"PARTIAL": True},
    "paired": {"PAIRED": True},
    "filter": {"FILTER": True},
    "bias, scale, softcap": {f"{s}_{o}": True for s in ("STUDENT", "TEACHER") for o in ("BIAS", "SCALE", "SOFTCAP")},
    "no gradient": {"KD_GRADIENT": False},
}
# Of rows in the shared memory of a cluster.
CLUSTER_OPTIONS: dict[str, dict[str, bool]] = {
    "plain": {"HAS_LABELS": False, "OWN_CE": False, "FORM_GRADIENT": True},
    "ce": {"HAS_LABELS": True, "OWN_CE": False, "FORM_GRADIENT": True},
    "ce, tempered": {"HAS_LABELS": True, "OWN_CE": True, "FORM_GRADIENT": True},
    "no gradient": {"HAS_LABELS": False, "OWN_CE": False, "FORM_GRADIENT": False},
}
CLUSTER_ARCHITECTURE = 90  # the first that has them
# The stages of heads cut over ranks.
PARTS: dict[str, dict[str, bool | str]] = {
    "parts, statistics": {"STAGE": "own", "HAS_LABELS": True, "KD_GRADIENT": False},
    "parts, sums": {"STAGE": "given", "KD_GRADIENT": False},
    "parts, gradient": {"STAGE": "given", "HAS_LABELS": True, "CE_GRADIENT": True},
}
FLAGS = {
    "HAS_TEACHER": True,
    "KD_GRADIENT": True,
    **dict.fromkeys(("HAS_LABELS", "CE_GRADIENT", "PARTIAL", "PAIRED", "TEMPERED", "FILTER"), False),
    **{f"{s}_{o}": False for s in ("STUDENT", "TEACHER") for o in ("BIAS", "SCALE", "SOFTCAP")},
}
POINTERS = {
    "teacher_ids": "*i32", "labels": "*i64", "choices": "*i32", "active": "*i8",
    "student": None, "teacher": None, "gradient": None, "student_bias": None, "teacher_bias": None,
}  # fmt: skip
FP32_POINTERS = (
    "row_scale", "row_parameters", "choice_gradients", "kd", "ce", "student_entropy", "teacher_entropy", "agreement",
    "statistics",
)  # fmt: skip
INTEGERS = ("student_stride", "teacher_stride", "gradient_stride", "num_rows", "V", "K")


@dataclass(frozen=True)
class Resources:
    registers: int
    shared_bytes: int
    spills: int  # local loads and stores in the machine code
    accesses: dict[str, int]  # of global memory, by instruction

    def __str__(self) -> str:
        accesses = ", ".join(f"{name} x{count}" for name, count in sorted(self.accesses.items()))
        return f"{self.registers:4d} registers {self.shared_bytes:6d} B shared {self.spills:3d} spills  {accesses}"


def compile_kernels(
    divergence: str, options: dict[str, bool | str], *, dtype: str, architecture: int
) -> dict[str, Resources]:
    """Compiles one form of the row kernel, and what goes before it, as the launcher would have it for a wide row."""
    from kdflow_kernels.divergences import JITChoices, JITPointwise, get_divergence
    from kdflow_kernels.row_kernels import row_kernel
    from kdflow_kernels.row_launch import STATISTICS_REGISTERS, power_of_two
    from kdflow_kernels.statistics_kernels import choice_kernel
    from kdflow_kernels.triton_backend import layout

    twin = get_divergence(divergence).jit()
    launch = layout(DTYPES[dtype], COLUMNS, 132)
    constants: dict[str, object] = {
        "LANES": launch.lanes,
        "WIDTH": launch.width,
        "KEPT_SHARE": launch.kept_share,
        "STAGE": 0,
    }
    constants |= {**FLAGS, **options}
    constants |= {"POINTWISE": None, "GRADIENT_SUM": None, "ROW_PARAMETERS": False, "NUM_CHOICES": 0}
    kernels: dict[str, Any] = {"row": row_kernel}
    if isinstance(twin, JITPointwise):
        constants |= {"POINTWISE": twin.function, "GRADIENT_SUM": twin.gradient_sum}
        if twin.row_parameters is not None:
            constants["ROW_PARAMETERS"] = True
            kernels["parameters"] = twin.row_parameters
        if constants["STAGE"] == "own":
            constants |= {"POINTWISE": None, "GRADIENT_SUM": None}
    elif isinstance(twin, JITChoices):
        constants |= {"OF_CHOICES": twin.function, "TOP_K": twin.top_k, "NUM_CHOICES": 2 * twin.top_k}
        constants |= {"CHOICES": power_of_two(twin.top_k), "STEPS": power_of_two(-(-COLUMNS // launch.block))}
        kernels["choices"] = choice_kernel
    else:
        raise ValueError(f"{divergence}: has no JIT form")
    found = {}
    for name, kernel in kernels.items():
        allowance = None if kernel is row_kernel else STATISTICS_REGISTERS
        found[name] = _compile(kernel, constants, dtype, architecture, launch.num_warps, allowance)
    return found


def compile_cluster_rows(divergence: str, options: dict[str, bool], *, architecture: int) -> Resources | None:
    """The same of rows in the shared memory of a cluster; None: not for this divergence. Needs NVRTC."""
    from kdflow_kernels import cluster_rows
    from kdflow_kernels.cpp_divergences import cpp_twin
    from kdflow_kernels.divergences import get_divergence

    twin, found = cpp_twin(get_divergence(divergence)), cluster_rows.layout(COLUMNS)
    if twin is None or found is None:
        return None
    cubin = cluster_rows.compile_form(found, twin[0], tuple(options.items()), architecture=architecture)
    sass = _cuobjdump("--dump-sass", cubin)
    return _resources(cubin, sass, found.shared_bytes)


def _compile(
    kernel, constants: dict[str, object], dtype: str, architecture: int, num_warps: int, allowance: int | None
) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name] or f"*{dtype}"
        elif name in FP32_POINTERS:
            signature[name] = "*fp32"
        else:
            signature[name] = "i32" if name in INTEGERS else "fp32"
    # Rows are padded to whole blocks, tensors aligned: what the launcher's arguments say of themselves.
    aligned = [
        (index,)
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_stride")
    ]
    attributes = {key: [["tt.divisibility", 16]] for key in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", architecture, 32)
    options = {"num_warps": num_warps}
    if allowance is not None:
        options["maxnreg"] = allowance
    while True:
        compiled = triton.compile(source, target=target, options=options)
        found = _resources(compiled.asm["cubin"], compiled.asm["sass"], compiled.metadata.shared)
        allowance = next_allowance(found.registers)
        if not found.spills or allowance is None:
            return found
        options["maxnreg"] = allowance


def _resources(cubin: bytes, sass: str, shared_bytes: int) -> Resources:
    # LDGSTS copies from global to shared memory.
    instructions = re.findall(r"\b(LDL|STL|LDGSTS|LDG|STG)((?:\.[A-Z0-9]+)*)", sass)
    spills = sum(name in ("LDL", "STL") for name, _ in instructions)
    accesses = Counter()
    for name, suffixes in instructions:
        if name not in ("LDL", "STL"):
            width = next((s for s in suffixes.split(".") if s in ("64", "128", "256")), "32")
            accesses[f"{name}.{width}"] += 1
    dump = _cuobjdump("--dump-resource-usage", cubin)
    registers = re.search(r"REG:(\d+)", dump)
    if registers is None:
        raise RuntimeError(f"cuobjdump: no register count in {dump!r}")
    return Resources(int(registers[1]), shared_bytes, spills, dict(accesses))


def _cuobjdump(what: str, cubin: bytes) -> str:
    """What a GPU's driver would say of machine code when it loads it."""
    import subprocess
    import tempfile

    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def main(arguments: list[str] | None = None) -> int:
    from kdflow_kernels import nvrtc
    from kdflow_kernels.divergences import get_divergence, list_divergences

    parser = argparse.ArgumentParser(prog="python -m kdflow_kernels.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=list(ARCHITECTURES), metavar="90")
    parser.add_argument("--quick", action="store_true", help="plain kernels of the last architecture only")
    given = parser.parse_args(arguments)
    names = [name for name in list_divergences() if get_divergence(name).jit() is not None]
    spilled = 0
    # What an option makes of the code is seen with one divergence of each kind.
    kinds = ("forward_kl", "adaptive_kl", "hierarchical_ranking")
    for architecture, dtype, name in itertools.product(given.arch[-1:] if given.quick else given.arch, DTYPES, names):
        options = {"plain": OPTIONS["plain"]} if given.quick or name not in kinds else OPTIONS
        if name == "jsd" and not given.quick:
            options = options | PARTS
        for option, flags in options.items():
            for kernel, found in compile_kernels(name, flags, dtype=dtype, architecture=architecture).items():
                spilled += found.spills > 0
                print(f"sm_{architecture} {dtype} {name:20} {kernel:10} {option:21} {found}", flush=True)
    without = nvrtc.unavailable()
    if without is not None:
        print(f"rows in clusters are left out: {without}", file=sys.stderr)
        names = []
    for architecture, name in itertools.product(given.arch[-1:] if given.quick else given.arch, names):
        for option, flags in itertools.islice(CLUSTER_OPTIONS.items(), 1 if given.quick else None):
            found = None
            if architecture >= CLUSTER_ARCHITECTURE:
                found = compile_cluster_rows(name, flags, architecture=architecture)
            if found is not None:
                spilled += found.spills > 0
                print(f"sm_{architecture} bf16 {name:20} {'cluster':10} {option:21} {found}", flush=True)
    return 1 if spilled else 0


if __name__ == "__main__":
    sys.exit(main())
