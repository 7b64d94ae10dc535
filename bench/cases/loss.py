"""``bench loss``: the fused loss, forward and backward, beside its peers and the bare GEMMs.

One repetition takes student and teacher hidden states and both heads to the mean loss and the
gradients of the student's hidden states and head: 2NV(Ht + 3Hs) flops in four GEMMs, which is the
floor. N rows, V vocabulary, Hs and Ht hidden sizes. Cross-entropy alone needs no teacher and three
GEMMs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from bench.cases.loss_case import (
    BESIDE,
    BESIDE_IN_CLUSTERS,
    CCE_EXACT,
    CE_PROVIDERS,
    CLUSTERS,
    COMPILED,
    EAGER,
    KDFLOW,
    LIGER,
    LIGER_FUSED,
    LIGER_SMALL,
    PROFILE,
    PROFILE_CLUSTERS,
    ROW_CHUNKS,
    TRL,
    VOCAB_CHUNKS,
    Shape,
    beside_case,
    ce_case,
    filter_case,
    kd_case,
    profile_case,
)
from bench.environment import has_native_bf16
from bench.model import Case, Provider

DIVERGENCES = ("forward_kl", "jsd")
SHAPES = (Shape(1024, 64000, 512, 1024), Shape(1024, 151936, 896, 2048))
QUICK_SHAPES = (Shape(256, 32000, 256, 512),)
PROVIDERS = (KDFLOW, EAGER, COMPILED, LIGER, LIGER_SMALL, TRL)
SWEPT = (KDFLOW, EAGER, COMPILED, LIGER_SMALL)
# As training begins, and about as it ends: the fewer layers are gone, the closer the two are.
FILTER_STUDENT_LAYERS = (10, 29)

# On a GPU: student and teacher as Qwen3-4B with 1.7B and 8B, and the shapes around them. The
# providers that hold full logits come last, so that the others share their groups.
GPU_SHAPES = (Shape(8192, 151936, 2560, 2048), Shape(8192, 151936, 2560, 4096))
GPU_QUICK_SHAPES = (Shape(2048, 32000, 2048, 4096),)
REHEARSED_SHAPES = (Shape(8, 256, 40, 48), Shape(8, 256, 40, 64))
GPU_NEAR = (KDFLOW, TRL, LIGER_FUSED)
GPU_PROVIDERS = (*GPU_NEAR, ROW_CHUNKS, VOCAB_CHUNKS, LIGER, COMPILED, EAGER)
GPU_SWEPT = (KDFLOW, TRL, COMPILED)


def cases(
    *,
    device: str,
    quick: bool,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    divergences: Sequence[str] = (),
    backend: str = "auto",
    sweep: bool = False,
) -> list[Case]:
    """The cases asked for; by default every shape in the main dtype with forward KL, and the first
    shape also with JSD and in the other dtype, cross-entropy, and the filter."""
    if sweep and (shapes or divergences or quick):
        raise ValueError("--sweep: has shapes of its own and forward KL; drop --shapes, --divergence and --quick")
    on_gpu = runs_gpu_code(device)
    main = "bf16" if on_gpu or has_native_bf16() else "fp32"
    providers = GPU_PROVIDERS if on_gpu else PROVIDERS
    if sweep:
        find = _gpu_sweep if on_gpu else _cpu_sweep
        found = [case for dtype in dtypes or (main,) for case in find(device, dtype)]
    elif shapes or dtypes or divergences:
        chosen = [Shape.parse(text) for text in shapes] or _shapes(device, quick)
        grid = [(s, t, d) for s in chosen for t in dtypes or (main,) for d in divergences or DIVERGENCES]
        found = [kd_case(*point, device, providers) for point in grid]
    elif quick:
        found = [kd_case(shape, main, DIVERGENCES[0], device, providers) for shape in _shapes(device, quick)]
    else:
        found = _gpu_cases(device) if on_gpu else _cpu_cases(device, main)
    return [replace(case, params={**case.params, "backend": backend}) for case in found]


def runs_gpu_code(device: str) -> bool:
    """On CUDA, and where Triton's interpreter rehearses on a CPU what CUDA would run."""
    return device.startswith("cuda") or os.environ.get("TRITON_INTERPRET") == "1"


def _shapes(device: str, quick: bool) -> tuple[Shape, ...]:
    if device.startswith("cuda"):
        return GPU_QUICK_SHAPES if quick else GPU_SHAPES
    if runs_gpu_code(device):
        return REHEARSED_SHAPES
    return QUICK_SHAPES if quick else SHAPES


def _cpu_cases(device: str, main: str) -> list[Case]:
    first, large = SHAPES
    other = "fp32" if main == "bf16" else "bf16"
    return [
        kd_case(first, main, "forward_kl", device, PROVIDERS),
        kd_case(large, main, "forward_kl", device, PROVIDERS),
        kd_case(first, main, "jsd", device, PROVIDERS),
        kd_case(first, other, "forward_kl", device, PROVIDERS),
        ce_case(large, main, device, CE_PROVIDERS),
        *(filter_case(layers, 1024, main, device) for layers in FILTER_STUDENT_LAYERS),
    ]


def _cpu_sweep(device: str, dtype: str) -> list[Case]:
    points = _around(
        Shape(1024, 32000, 512, 1024), rows=(256, 4096), vocabularies=(8192, 64000, 151936), hidden=(256, 1024, 2048)
    )
    found = [kd_case(point, dtype, "forward_kl", device, SWEPT) for point in points]
    return [replace(case, budget_scale=0.2) for case in found]


def _gpu_cases(device: str) -> list[Case]:
    """In the order of their worth: what has goals, where the time goes, the filter, cross-entropy, the sweep.

    The first case has every provider, the others those that are near. Their processes go on from case to case: starting
    them takes about ten times as long as measuring.
    """
    first, wide = _shapes(device, quick=False)
    on_cuda = device.startswith("cuda")
    clusters = (CLUSTERS,) if on_cuda else ()
    beside = (*BESIDE, *BESIDE_IN_CLUSTERS) if on_cuda else BESIDE
    profiles = (PROFILE, PROFILE_CLUSTERS) if on_cuda else (PROFILE,)
    with_goals = [
        kd_case(first, "bf16", "forward_kl", device, (*clusters, *GPU_PROVIDERS)),
        kd_case(first, "bf16", "jsd", device, (*clusters, *GPU_NEAR, ROW_CHUNKS, VOCAB_CHUNKS, LIGER)),
        kd_case(wide, "bf16", "forward_kl", device, (*clusters, *GPU_NEAR, COMPILED)),
        kd_case(first, "bf16", "reverse_kl", device, (*clusters, *GPU_NEAR)),
    ]
    return [
        *(replace(case, worker_pool="loss") for case in with_goals),
        beside_case(first, "bf16", device, beside),
        *(profile_case(first, divergence, device, profiles) for divergence in DIVERGENCES),
        *(filter_case(layers, first.num_rows, "bf16", device) for layers in FILTER_STUDENT_LAYERS),
        ce_case(first, "bf16", device, (*CE_PROVIDERS, CCE_EXACT)),
        # The first one has been measured; compiling anew for each shape would take longer than the rest.
        *_gpu_sweep(device, "bf16", (KDFLOW, TRL))[1:],
    ]


def _gpu_sweep(device: str, dtype: str, providers: Sequence[Provider] = GPU_SWEPT) -> list[Case]:
    first, _ = _shapes(device, quick=False)
    rows, vocab, hidden = first.num_rows, first.vocab_size, first.student_hidden
    points = _around(
        first,
        rows=(rows // 8, rows // 2, 2 * rows),
        vocabularies=(32000, 262144) if device.startswith("cuda") else (vocab // 2, 2 * vocab),
        hidden=(hidden * 2 // 5, hidden * 8 // 5),
    )
    found = [kd_case(point, dtype, "forward_kl", device, providers) for point in points]
    return [replace(case, worker_pool="loss", budget_scale=0.15) for case in found]


def _around(first: Shape, *, rows: Sequence[int], vocabularies: Sequence[int], hidden: Sequence[int]) -> list[Shape]:
    """A shape, and those that differ from it in N, V or Hs alone."""
    return [
        first,
        *(replace(first, num_rows=value) for value in rows),
        *(replace(first, vocab_size=value) for value in vocabularies),
        *(replace(first, student_hidden=value) for value in hidden),
    ]
