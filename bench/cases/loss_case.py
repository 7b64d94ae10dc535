"""The cases that ``bench loss`` is made of: a job of one shape, its providers, and its floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.environment import has_native_bf16
from bench.model import Case, Provider

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

MODULE = "bench.cases.loss_providers"
KDFLOW = Provider("kdflow", f"{MODULE}:kdflow", "ours")
CLUSTERS = Provider("kdflow, clusters", f"{MODULE}:kdflow_clusters", "ours")
EAGER = Provider("eager", f"{MODULE}:eager")
COMPILED = Provider("torch.compile", f"{MODULE}:compiled")
LIGER = Provider("liger", f"{MODULE}:liger")
LIGER_SMALL = Provider("liger chunk 128", f"{MODULE}:liger_small_chunks")
LIGER_FUSED = Provider("liger fused", f"{MODULE}:liger_fused")
TRL = Provider("trl", f"{MODULE}:trl")
ROW_CHUNKS = Provider("eager, row chunks recomputed", f"{MODULE}:row_chunks")
VOCAB_CHUNKS = Provider("eager, vocabulary chunks", "bench.cases.loss_vocab_chunks:vocab_chunks")
PROFILE = Provider("kdflow, profiled", "bench.cases.loss_profile:kernels", "ours")
PROFILE_CLUSTERS = Provider("kdflow, clusters, profiled", "bench.cases.loss_profile:kernels_in_clusters", "ours")
BESIDE = (
    Provider("kdflow, forward_kl", f"{MODULE}:kdflow_forward_kl", "ours"),
    Provider("kdflow, jsd", f"{MODULE}:kdflow_jsd", "ours"),
)
BESIDE_IN_CLUSTERS = (
    Provider("kdflow, clusters, forward_kl", f"{MODULE}:clusters_forward_kl", "ours"),
    Provider("kdflow, clusters, jsd", f"{MODULE}:clusters_jsd", "ours"),
)

CROSS_ENTROPY = "bench.cases.loss_ce"
CE_PROVIDERS = (
    Provider("kdflow", f"{CROSS_ENTROPY}:kdflow", "ours"),
    Provider("eager", f"{CROSS_ENTROPY}:eager"),
    Provider("torch.compile", f"{CROSS_ENTROPY}:compiled"),
    Provider("liger fused", f"{CROSS_ENTROPY}:liger"),
    Provider("cce", f"{CROSS_ENTROPY}:cce"),
)
CCE_EXACT = Provider("cce, exact", f"{CROSS_ENTROPY}:cce_exact")

FILTER = "bench.cases.loss_filter"
FILTER_PROVIDERS = (
    Provider("4 GEMMs", f"{FILTER}:gemms", "floor"),
    Provider("kdflow, exact", f"{FILTER}:exact", "ours"),
    Provider("kdflow, eps 2e-5", f"{FILTER}:eps_2e_5", "ours"),
    Provider("kdflow, eps 6e-5", f"{FILTER}:eps_6e_5", "ours"),
    Provider("kdflow, eps 2e-4", f"{FILTER}:eps_2e_4", "ours"),
)

# About what a process holds of a GPU, with two heads: bytes for each of the N x V logits, and MiB besides inputs.
LOGIT_BYTES = {"4 GEMMs": 6, "3 GEMMs": 8, "torch.compile": 10, "eager": 32}
CONTEXT_MIB, CHUNKS_MIB = 1024, 6144


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
            shape = cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError):
            shape = cls(0, 0, 0, 0)
        if min(vars(shape).values()) < 1:
            raise ValueError(f"--shapes: expected N,V,Hs,Ht as in 1024,64000,512,1024, got {text!r}")
        return shape

    @property
    def flops(self) -> float:
        """2NV(Ht + 3Hs): both projections and the two gradient GEMMs."""
        per_logit = self.teacher_hidden + 3 * self.student_hidden
        return 2.0 * self.num_rows * self.vocab_size * per_logit

    def __str__(self) -> str:
        return f"N={self.num_rows} V={self.vocab_size} Hs={self.student_hidden} Ht={self.teacher_hidden}"


def floors(dtype: str, device: str, *, num_gemms: int = 4) -> tuple[Provider, ...]:
    """The GEMM floors that are honest for this dtype on this hardware.

    A CPU without bf16 instructions emulates bf16 GEMMs, often slower than fp32 ones on operands cast
    up first. The floor is the faster of the two, casts included; without the casts it is a bound.
    """
    name, entry = f"{num_gemms} GEMMs", "gemms" if num_gemms == 4 else "student_gemms"
    module = "bench.cases.loss_floors"
    native = Provider(name, f"{module}:{entry}", "floor")
    if device == "cpu" and dtype == "bf16" and not has_native_bf16():
        included = Provider(f"{name} in fp32, casts included", f"{module}:upcast_{entry}", "floor")
        excluded = Provider(f"{name} in fp32, casts excluded", f"{module}:fp32_{entry}", "bound")
        return included, native, excluded
    return (native,)


def kd_case(shape: Shape, dtype: str, divergence: str, device: str, providers: Sequence[Provider]) -> Case:
    """One divergence between hidden states of both sides."""
    params = {"divergence": divergence, "dtype": dtype, "device": device, **vars(shape)}
    hidden = shape.student_hidden, shape.teacher_hidden
    name = f"{divergence} {dtype} {shape}"
    return _case(name, params, (*floors(dtype, device), *providers), shape.flops, hidden)


def ce_case(shape: Shape, dtype: str, device: str, providers: Sequence[Provider]) -> Case:
    """Cross-entropy alone, which the fused loss does without a teacher: 6NVHs flops."""
    rows, vocab, hidden = shape.num_rows, shape.vocab_size, shape.student_hidden
    params = {"dtype": dtype, "device": device, "num_rows": rows, "vocab_size": vocab, "student_hidden": hidden}
    name = f"cross_entropy {dtype} N={rows} V={vocab} Hs={hidden}"
    flops = 6.0 * rows * vocab * hidden
    return _case(name, params, (*floors(dtype, device, num_gemms=3), *providers), flops, (hidden,))


def _case(
    name: str, params: Mapping[str, Any], providers: Sequence[Provider], flops: float, hidden: tuple[int, ...]
) -> Case:
    """``hidden`` is the width of each head."""
    rows, vocab, on_gpu = params["num_rows"], params["vocab_size"], params["device"].startswith("cuda")
    input_mib = ITEM_BYTES[params["dtype"]] * (rows + vocab) * sum(hidden) / 2**20
    logits = rows * vocab / 2**20

    def sized(provider: Provider) -> Provider:
        work = LOGIT_BYTES[provider.name] * logits if provider.name in LOGIT_BYTES else CHUNKS_MIB
        return replace(provider, device_mib=CONTEXT_MIB + 2 * input_mib + work * len(hidden) / 2)

    return Case(
        suite="loss",
        name=name,
        params=params,
        providers=tuple(map(sized, providers)),
        work=flops,
        unit="flop",
        worker_mib=500 + 2 * input_mib,
        setup_timeout_s=75 if on_gpu else 120,
        warm_up_timeout_s=90 if on_gpu else 120,
    )


def beside_case(shape: Shape, dtype: str, device: str, providers: Sequence[Provider]) -> Case:
    """JSD and forward KL in turn, since what is between them is less than what clocks do from one case to the next."""
    case = kd_case(shape, dtype, "jsd", device, providers)
    return replace(case, name=f"jsd beside forward_kl, {dtype}, {shape}", measures_memory=False, reps_scale=3)


def profile_case(shape: Shape, divergence: str, device: str, providers: Sequence[Provider]) -> Case:
    """Where the time of one shape goes, kernel by kernel."""
    case = kd_case(shape, "bf16", divergence, device, providers)
    params = {**case.params, "profiled": True}  # no point of a sweep
    return replace(
        case, name=f"kernels of {case.name}", params=params, measures_memory=False, worker_pool="loss kernels"
    )


def filter_case(student_layers: int, num_rows: int, dtype: str, device: str) -> Case:
    """``grad_filter_eps`` on the quickstart's models, the student cut to so many layers."""
    shape = Shape(num_rows, 49152, 576, 576)
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
        worker_pool="loss filter" if device.startswith("cuda") else "",
    )
