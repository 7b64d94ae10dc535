"""The row kernel for clusters: whether its numbers are the Triton kernel's, its time in other cuts, where that goes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from bench.tune.losses import whole_loss
from bench.tune.measure import Shape, constants, line, tell
from bench.tune.phases import PHASES, ClockedKernel, with_clock
from bench.tune.rows import Rows
from kdflow_kernels import cluster_rows, get_divergence, nvrtc, triton_backend
from kdflow_kernels.cluster_rows import ClusterLauncher, Form, Layout
from kdflow_kernels.cpp_divergences import cpp_twin
from kdflow_kernels.problem import RowTerms

DIVERGENCES = ("forward_kl", "jsd", "reverse_kl")
# Blocks of a cluster, of a multiprocessor, threads. Not every GPU takes more than 8 blocks in a cluster.
CUTS = ((8, 2, 352), (8, 2, 256), (8, 1, 992), (4, 1, 960), (16, 2, 416), (16, 4, 256), (16, 5, 192))
ROWS_PER_CLUSTER = (1, 2, 8, 32)
SCHEDULING_POLICIES = (0, 2)  # beside the one that is used
PLAIN = (("HAS_LABELS", False), ("OWN_CE", False), ("FORM_GRADIENT", True))
REPETITIONS = 20
MOST_OFF = {"gradient": 2**-7, "kd": 0.01, "student_entropy": 0.01, "teacher_entropy": 0.01, "agreement": 0.0}


@dataclass(frozen=True)
class Variant:
    """What is other than as it comes."""

    layout: Layout
    rows_per_cluster: int = cluster_rows.ROWS_PER_CLUSTER
    policy: int = nvrtc.SCHEDULING_POLICY

    def __str__(self) -> str:
        found = self.layout
        words = f"cluster {found.cluster} threads {found.threads} blocks {found.blocks_per_processor}"
        words += f" rows {self.rows_per_cluster}"
        return words if self.policy == nvrtc.SCHEDULING_POLICY else f"{words} scheduling {self.policy}"


def variants(num_columns: int) -> list[Variant]:
    plain = _plain(num_columns)
    assert plain is not None
    return [
        Variant(plain),
        *(Variant(cluster_rows.cut(num_columns, *given)) for given in CUTS),
        *(Variant(plain, rows_per_cluster=count) for count in ROWS_PER_CLUSTER),
        *(Variant(plain, policy=policy) for policy in SCHEDULING_POLICIES),
    ]


def _plain(num_columns: int) -> Layout | None:
    return cluster_rows.layout(num_columns, cluster_rows.shared_bytes(torch.device("cuda")))


def _possible(s: Shape, name: str, device: torch.device) -> bool:
    without = cluster_rows.unavailable(device)
    if without is None and _plain(s.V) is None:
        without = "a row has no place in the shared memory"
    if without is not None:
        tell("clusters", name, f"left out: {without}")
    return without is None


def time_clusters(s: Shape, divergence: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    if not _possible(s, divergence, device):
        return
    tried = variants(s.V)
    with line("clusters", f"{divergence} compiled"):
        compile_all(tried, divergence, device)
    for variant in tried:
        name = f"{divergence} bf16 {variant}"
        try_variant(s, divergence, variant, name)
    whole_loss(s, "rows in clusters", divergence, CLUSTER_ROWS=True)


def circumstances(s: Shape) -> None:
    """What only a device tells of the ways to start it. The last one may leave nothing behind that others could use."""
    if not _possible(s, "circumstances", torch.device("cuda", torch.cuda.current_device())):
        return
    checks = {"graph": in_graph, "another thread": on_another_thread, "loaded in a capture": loaded_in_capture}
    for name, check in checks.items():
        with line("clusters", name), constants(triton_backend, CLUSTER_ROWS=True):
            tell("clusters", name, check(lambda: Rows(s, "jsd", triton_backend.CHUNK_ROWS)))


def compile_all(tried: list[Variant], divergence: str, device: torch.device) -> None:
    """Every form at once, each with and without a clock; the launchers find them compiled."""
    twin = cpp_twin(get_divergence(divergence))
    assert twin is not None
    plain: list[Form] = [(found, twin[0], PLAIN) for found in dict.fromkeys(variant.layout for variant in tried)]
    forms = [*plain, *map(with_clock, plain)]
    major, minor = torch.cuda.get_device_capability(device)

    def compiled(form: Form) -> str:
        try:
            cluster_rows.compile_form(*form, architecture=10 * major + minor)
        except RuntimeError as error:  # it comes again, in that form's line
            return str(error)
        return ""

    begun = time.perf_counter()
    with ThreadPoolExecutor() as executor:
        failed = sum(map(bool, executor.map(compiled, forms)))
    took = time.perf_counter() - begun
    tell("clusters", divergence, f"{len(forms)} forms compiled for sm_{major}{minor} in {took:.1f} s, {failed} failed")


def try_variant(s: Shape, divergence: str, variant: Variant, name: str) -> None:
    changed = {"layout": lambda *_: variant.layout, "ROWS_PER_CLUSTER": variant.rows_per_cluster}
    with (
        line("clusters", name),
        constants(triton_backend, CLUSTER_ROWS=True),
        constants(cluster_rows, **changed),
        constants(nvrtc, SCHEDULING_POLICY=variant.policy),
    ):
        cluster_rows.load.cache_clear()  # the policy is an attribute of what is loaded
        rows = Rows(s, divergence, triton_backend.CHUNK_ROWS)
        launcher = rows.run.launcher
        assert isinstance(launcher, ClusterLauncher)
        tell("clusters", name, of_driver(launcher))
        tell("clusters", name, against_triton(rows))
        tell("clusters", name, repeated(rows))
        rows.time(name)
        clocked = launcher.kernel = ClockedKernel(launcher)
        rows.time(f"{name} with a clock")
        found = clocked.found(variant.layout.cluster)
        cycles = {phase: round(found.cycles[phase], 1) for phase in PHASES}
        tell("clusters", name, str(found), cycles=cycles, slowest=found.slowest)


def of_driver(launcher: ClusterLauncher) -> str:
    """What the driver says of a form: registers, what it spills, and how many clusters run at once, of how many."""
    found, function = launcher.layout, cluster_rows.load(*launcher.form, launcher.row_scale.device)
    figures = function.figures(256 * found.cluster, found.threads)
    words = ", ".join(f"{name} {value}" for name, value in figures.items())
    return f"{words} of {launcher.clusters_at_once} by the number of multiprocessors"


def against_triton(rows: Rows) -> str:
    """The largest differences, relative; and where they are, should they be more than rounding."""
    columns, launcher = rows.run.columns, rows.run.launcher  # beyond them only what has no mass
    ours, gradient = rows.launch(), rows.out[:, :columns].clone()
    with constants(triton_backend, CLUSTER_ROWS=False):
        rows.run.launcher = rows.run._launcher()
    theirs, expected = rows.launch(), rows.out[:, :columns]
    rows.run.launcher = launcher
    off = {"gradient": (gradient.float() - expected.float()).abs_().div_(expected.float().abs().max())}
    for field in ("kd", "student_entropy", "teacher_entropy"):
        of_ours, of_theirs = getattr(ours, field), getattr(theirs, field)
        off[field] = (of_ours - of_theirs).abs() / of_theirs.abs().clamp(min=1e-3)
    off["agreement"] = (ours.top1_agreement != theirs.top1_agreement).float()
    words = "against Triton's, relative: " + ", ".join(f"{key} {float(value.max()):.2g}" for key, value in off.items())
    wrong = [_where(name, ~(value <= MOST_OFF[name])) for name, value in off.items()]  # NaN is wrong, too
    return " ".join([words, *filter(None, wrong)])


def _where(name: str, wrong: torch.Tensor) -> str:
    if not wrong.any():
        return ""
    words = f"WRONG {name}: {int(wrong.sum())} of {wrong.numel()}"
    for axis, what in enumerate(("rows", "columns")[: wrong.ndim]):
        places = (wrong if wrong.ndim == 1 else wrong.any(1 - axis)).nonzero().flatten()
        words += f", {len(places)} {what} {int(places[0])}..{int(places[-1])}"
    return words + ";"


def repeated(rows: Rows) -> str:
    """A race is rarely lost twice in the same way."""
    first = _bits(rows, rows.launch())
    others = [_bits(rows, rows.launch()) for _ in range(REPETITIONS)]
    differ = sum(not all(map(torch.equal, first, other)) for other in others)
    return f"{differ} of {REPETITIONS} launches differ from the first one{' WRONG' if differ else ''}"


def _bits(rows: Rows, terms: RowTerms) -> list[torch.Tensor]:
    found = [getattr(terms, field) for field in ("kd", "student_entropy", "teacher_entropy", "top1_agreement")]
    # Of the gradient, of which there is no room for twenty, a sum over bits that each of them enters by its place.
    bits = rows.out.view(torch.int16)
    column = torch.arange(bits.shape[1], device=bits.device) * 2_654_435_761 % 65_521 + 1
    of_rows = [(part.long() * column).sum(1) for part in bits.split(128)]
    return [*(value.contiguous().view(torch.int32) for value in found if value.dtype == torch.float32), *of_rows]


def in_graph(make: Callable[[], Rows]) -> str:
    rows = make()
    first = _bits(rows, rows.launch())
    graph, terms = _captured(rows.launch)
    rows.out.zero_()
    graph.replay()
    return _same(first, _bits(rows, terms))


def loaded_in_capture(make: Callable[[], Rows]) -> str:
    """As where nothing has run before a capture: the launcher would have loaded the kernel."""
    rows = make()
    first, launcher = _bits(rows, rows.launch()), rows.run.launcher
    assert isinstance(launcher, ClusterLauncher)

    def loads_and_launches() -> RowTerms:
        cluster_rows.load.cache_clear()
        launcher.kernel = cluster_rows.kernel(*launcher.form, launcher.row_scale.device)
        return rows.launch()

    graph, terms = _captured(loads_and_launches)
    graph.replay()
    return _same(first, _bits(rows, terms))


def _captured(step: Callable[[], RowTerms]) -> tuple[torch.cuda.CUDAGraph, RowTerms]:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        terms = step()
    return graph, terms


def on_another_thread(make: Callable[[], Rows]) -> str:
    """A thread begins without a context of the driver's: that it has one when the kernel is loaded is torch's doing."""
    rows, found = make(), []
    first = _bits(rows, rows.launch())
    cluster_rows.load.cache_clear()

    def body() -> None:
        try:
            other = make()
            found.append(_same(first, _bits(other, other.launch())))
        except RuntimeError as error:
            found.append(f"RuntimeError: {str(error)[:300]}")

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return found[0] if found else "it ended without a word"


def _same(first: list[torch.Tensor], other: list[torch.Tensor]) -> str:
    return "the same numbers" if all(map(torch.equal, first, other)) else "WRONG: other numbers"
