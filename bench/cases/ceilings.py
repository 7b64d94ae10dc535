"""``bench ceilings``: what the device reaches at most: bf16 GEMMs and copies.

The figures that the other suites are held against: a square GEMM, a copy inside the device's
memory, and on a GPU copies to and from pinned host memory.
"""

from __future__ import annotations

from bench.model import Case, Provider

MODULE = "bench.cases.ceilings_providers"
GEMM = Provider("torch.mm", f"{MODULE}:gemm", "floor")
COPY = Provider("copy inside the device", f"{MODULE}:device_copy", "floor")
HOST_COPIES = (
    Provider("pinned host to device", f"{MODULE}:host_to_device", "floor"),
    Provider("device to pinned host", f"{MODULE}:device_to_host", "floor"),
    Provider("both at once", f"{MODULE}:both_ways", "bound"),
)
MIB = 2**20
REPEATS = 10  # in a step: a single copy is hardly longer than its launch


def cases(*, device: str, quick: bool) -> list[Case]:
    """One GEMM and, for each kind of memory, one copy large enough to be in no cache."""
    on_gpu = device.startswith("cuda")
    size = 8192 if on_gpu and not quick else 1024
    copied = (1024 if on_gpu else 64) * MIB
    found = [
        _case(f"bf16 GEMM {size} x {size} x {size}", device, (GEMM,), 2.0 * size**3, "flop", {"size": size}),
        _case(f"device copy {copied // MIB} MiB", device, (COPY,), float(copied), "byte", {"num_bytes": copied}),
    ]
    if on_gpu:
        copied = 256 * MIB
        name = f"PCIe copy {copied // MIB} MiB"
        found.append(_case(name, device, HOST_COPIES, float(copied), "byte", {"num_bytes": copied}))
    return found


def _case(
    name: str, device: str, providers: tuple[Provider, ...], work: float, unit: str, params: dict[str, int]
) -> Case:
    return Case(
        suite="ceilings",
        name=name,
        params={"device": device, "repeats": REPEATS, **params},
        providers=providers,
        work=REPEATS * work,
        unit=unit,
        measures_memory=False,
    )
