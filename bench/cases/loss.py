"""``bench loss``: the fused loss, forward and backward, beside its peers and the bare GEMMs.

One repetition takes student and teacher hidden states and both heads to the mean loss and the
gradients of the student's hidden states and head: 2NV(Ht + 3Hs) flops in four GEMMs, which is the
floor. N rows, V vocabulary, Hs and Ht hidden sizes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.environment import has_native_bf16
from bench.model import Case, Provider

MODULE = "bench.cases.loss_providers"
SHAPES = ((1024, 64000, 512, 1024), (1024, 151936, 896, 2048))
QUICK_SHAPES = ((256, 32000, 256, 512),)
DIVERGENCES = ("forward_kl", "jsd")
ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

PROVIDERS = (
    Provider("kdflow", f"{MODULE}:kdflow", "ours"),
    Provider("eager", f"{MODULE}:eager"),
    Provider("torch.compile", f"{MODULE}:compiled"),
    Provider("liger", f"{MODULE}:liger"),
    Provider("liger chunk 128", f"{MODULE}:liger_small_chunks"),
    Provider("trl", f"{MODULE}:trl"),
)
ROW_CHUNKS = Provider("eager, row chunks recomputed", f"{MODULE}:row_chunks")
VOCAB_CHUNKS = Provider("eager, vocabulary chunks", "bench.cases.loss_vocab_chunks:vocab_chunks")
LIGER_FUSED = Provider("liger fused", f"{MODULE}:liger_fused")
NATIVE_FLOOR = Provider("4 GEMMs", f"{MODULE}:gemms", "floor")

# On a GPU: student and teacher as Qwen3-4B with 1.7B and 8B, and the shapes around them. The
# providers that hold full logits come last, so that the others share their groups.
GPU_SHAPES = ((8192, 151936, 2560, 2048), (8192, 151936, 2560, 4096))
GPU_SWEEP = (
    (1024, 151936, 2560, 2048),
    (4096, 151936, 2560, 2048),
    (16384, 151936, 2560, 2048),
    (8192, 32000, 2560, 2048),
    (8192, 128256, 2560, 2048),
)
GPU_QUICK_SHAPES = ((2048, 32000, 2048, 4096),)
KDFLOW, EAGER, COMPILED, LIGER, _, TRL = PROVIDERS
GPU_SWEPT = (KDFLOW, TRL, LIGER_FUSED)
GPU_PROVIDERS = (*GPU_SWEPT, ROW_CHUNKS, VOCAB_CHUNKS, LIGER, COMPILED, EAGER)
PROFILE = Provider("kdflow, profiled", "bench.cases.loss_profile:kernels", "ours")
# About what a process holds of the GPU: bytes for each of the N x V logits, and MiB besides inputs.
LOGIT_BYTES = {"4 GEMMs": 6, "torch.compile": 22, "eager": 32}
CONTEXT_MIB, CHUNKS_MIB = 1024, 6144
FILTER = "bench.cases.loss_filter"
FILTER_PROVIDERS = (
    Provider("4 GEMMs", f"{FILTER}:gemms", "floor"),
    Provider("kdflow, exact", f"{FILTER}:exact", "ours"),
    Provider("kdflow, eps 2e-5", f"{FILTER}:eps_2e_5", "ours"),
    Provider("kdflow, eps 6e-5", f"{FILTER}:eps_6e_5", "ours"),
    Provider("kdflow, eps 2e-4", f"{FILTER}:eps_2e_4", "ours"),
)
# As a training begins, and about as it ends: the fewer layers are gone, the closer the two are.
FILTER_STUDENT_LAYERS = (10, 29)
# A CPU without bf16 instructions emulates bf16 GEMMs, often slower than fp32 ones on operands cast
# up first. The floor is the faster of the two, casts included; without the casts it is a bound.
UPCAST_FLOOR = Provider("4 GEMMs in fp32, casts included", f"{MODULE}:upcast_gemms", "floor")
UPCAST_BOUND = Provider("4 GEMMs in fp32, casts excluded", f"{MODULE}:fp32_gemms", "bound")


@dataclass(frozen=True)
class Shape:
    num_rows: int
    vocab_size: int
    student_hidden: int
    teacher_hidden: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """From ``"N,V,Hs,Ht"``."""
        try:
            return cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError):
            raise ValueError(f"--shapes: expected N,V,Hs,Ht as in 1024,64000,512,1024, got {text!r}") from None

    @property
    def flops(self) -> float:
        """2NV(Ht + 3Hs): both projections and the two gradient GEMMs."""
        per_logit = self.teacher_hidden + 3 * self.student_hidden
        return 2.0 * self.num_rows * self.vocab_size * per_logit

    def __str__(self) -> str:
        return f"N={self.num_rows} V={self.vocab_size} Hs={self.student_hidden} Ht={self.teacher_hidden}"


def floors(dtype: str, device: str) -> tuple[Provider, ...]:
    """The GEMM floors that are honest for this dtype on this hardware."""
    if device == "cpu" and dtype == "bf16" and not has_native_bf16():
        return (UPCAST_FLOOR, NATIVE_FLOOR, UPCAST_BOUND)
    return (NATIVE_FLOOR,)


def cases(
    *,
    device: str,
    quick: bool,
    shapes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    divergences: Sequence[str] = (),
    backend: str = "auto",
) -> list[Case]:
    """The cases asked for; by default every shape in the main dtype with forward KL, and the first
    shape also with JSD and in the other dtype."""
    if runs_gpu_code(device):
        found = _gpu_cases(device, quick, shapes, dtypes, divergences)
    else:
        found = _cpu_cases(device, quick, shapes, dtypes, divergences)
    return [replace(case, params={**case.params, "backend": backend}) for case in found]


def runs_gpu_code(device: str) -> bool:
    """On CUDA, and where Triton's interpreter rehearses on a CPU what CUDA would run."""
    return device.startswith("cuda") or os.environ.get("TRITON_INTERPRET") == "1"


def _gpu_cases(
    device: str, quick: bool, shapes: Sequence[str], dtypes: Sequence[str], divergences: Sequence[str]
) -> list[Case]:
    """By default forward KL at both main shapes, JSD and reverse KL at the first, then the sweep;
    the first case has every provider, the others those that are near."""
    if shapes or dtypes or divergences:
        chosen = [Shape.parse(text) for text in shapes] or [Shape(*shape) for shape in GPU_SHAPES]
        grid = [
            (shape, dtype, divergence)
            for shape in chosen
            for dtype in dtypes or ("bf16",)
            for divergence in divergences or DIVERGENCES
        ]
        return [_case(*point, device, GPU_PROVIDERS) for point in grid]
    if quick:
        return [_case(Shape(*shape), "bf16", DIVERGENCES[0], device, GPU_PROVIDERS) for shape in GPU_QUICK_SHAPES]
    first, *others = (Shape(*shape) for shape in GPU_SHAPES)
    found = [
        _case(first, "bf16", "forward_kl", device, GPU_PROVIDERS),
        _case(first, "bf16", "jsd", device, (*GPU_SWEPT, ROW_CHUNKS, VOCAB_CHUNKS, LIGER)),
        *(profile_case(first, divergence, device) for divergence in DIVERGENCES),
        *(_case(shape, "bf16", "forward_kl", device, GPU_SWEPT) for shape in others),
        _case(first, "bf16", "reverse_kl", device, GPU_SWEPT),
    ]
    return found + [_case(Shape(*shape), "bf16", "forward_kl", device, GPU_SWEPT) for shape in GPU_SWEEP]


def profile_case(shape: Shape, divergence: str, device: str) -> Case:
    """Where the time of one shape goes, kernel by kernel."""
    case = _case(shape, "bf16", divergence, device, (PROFILE,))
    params = {**case.params, "profiled": True}  # no point of a sweep
    return replace(case, name=f"kernels of {case.name}", params=params, measures_memory=False)


def _cpu_cases(
    device: str, quick: bool, shapes: Sequence[str], dtypes: Sequence[str], divergences: Sequence[str]
) -> list[Case]:
    chosen = [Shape.parse(text) for text in shapes]
    chosen = chosen or [Shape(*shape) for shape in (QUICK_SHAPES if quick else SHAPES)]
    native = device != "cpu" or has_native_bf16()
    main, other = ("bf16", "fp32") if native else ("fp32", "bf16")
    if dtypes or divergences:
        return [
            _case(shape, dtype, divergence, device)
            for shape in chosen
            for dtype in dtypes or (main,)
            for divergence in divergences or DIVERGENCES
        ]
    grid = [(shape, main, DIVERGENCES[0]) for shape in chosen]
    filters: list[Case] = []
    if not quick:
        filters = [filter_case(layers, main, device) for layers in FILTER_STUDENT_LAYERS]
        grid += [(chosen[0], main, divergence) for divergence in DIVERGENCES[1:]]
        grid.append((chosen[0], other, DIVERGENCES[0]))
    return [*(_case(*point, device) for point in grid), *filters]


def filter_case(student_layers: int, dtype: str, device: str) -> Case:
    """``grad_filter_eps`` on the quickstart's models, the student cut to so many layers."""
    shape = Shape(1024, 49152, 576, 576)
    return Case(
        suite="loss",
        name=f"grad_filter_eps {dtype}, SmolLM2-135M and its cut to {student_layers} layers, {shape}",
        params={
            "config": "examples/quickstart.yaml",
            "student_layers": student_layers,
            "num_rows": shape.num_rows,
            "dtype": dtype,
            "device": device,
        },
        providers=FILTER_PROVIDERS,
        work=shape.flops,
        unit="flop",
        worker_mib=1500,
    )


def _case(shape: Shape, dtype: str, divergence: str, device: str, providers: tuple[Provider, ...] = PROVIDERS) -> Case:
    rows, hidden = shape.num_rows, shape.student_hidden + shape.teacher_hidden
    input_mib = ITEM_BYTES[dtype] * (rows + shape.vocab_size) * hidden / 2**20
    logits = rows * shape.vocab_size / 2**20

    def sized(provider: Provider) -> Provider:
        work = LOGIT_BYTES[provider.name] * logits if provider.name in LOGIT_BYTES else CHUNKS_MIB
        return replace(provider, device_mib=CONTEXT_MIB + 2 * input_mib + work)

    return Case(
        suite="loss",
        name=f"{divergence} {dtype} {shape}",
        params={
            "divergence": divergence,
            "dtype": dtype,
            "device": device,
            "num_rows": shape.num_rows,
            "vocab_size": shape.vocab_size,
            "student_hidden": shape.student_hidden,
            "teacher_hidden": shape.teacher_hidden,
        },
        providers=tuple(map(sized, (*floors(dtype, device), *providers))),
        work=shape.flops,
        unit="flop",
        worker_mib=500 + 2 * input_mib,
        setup_timeout_s=75 if device.startswith("cuda") else 120,
        warm_up_timeout_s=90 if device.startswith("cuda") else 120,
    )
