"""``bench ceilings``: what the device reaches at most: GEMMs, attention, a layer's operators, copies, rows of the loss.

The figures that the other suites are held against, and the rates that ``kdflow plan`` and ``bench
roofline`` compute with: a square GEMM, causal attention and the eager operators of a Llama layer,
both forward and backward, a copy inside the device's memory, the passes of the loss over its logits
(a loss whose matrix products are too thin to count), and on a GPU copies to and from pinned host
memory.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from bench.cases.loss_case import ITEM_BYTES
from bench.environment import has_native_bf16
from bench.model import Case, Provider
from kdflow.plan import work
from kdflow.plan.shapes import shape_of

MODULE = "bench.cases.ceilings_providers"
GEMM = Provider("torch.mm", f"{MODULE}:gemm", "floor")
ATTENTION = Provider("SDPA", f"{MODULE}:attention", "floor")
OPERATORS = Provider("operators of a layer", f"{MODULE}:layer_operators", "floor")
COPY = Provider("copy inside the device", f"{MODULE}:device_copy", "floor")
LOSS_ROWS = Provider("rows of the loss", f"{MODULE}:loss_rows", "floor")
HOST_COPIES = (
    Provider("pinned host to device", f"{MODULE}:host_to_device", "floor"),
    Provider("device to pinned host", f"{MODULE}:device_to_host", "floor"),
    Provider("both at once", f"{MODULE}:both_ways", "bound"),
)
MIB = 2**20
REPEATS = 10  # in a step: a single copy is hardly longer than its launch
THIN_HIDDEN = 16
VOCAB = 49152


def cases(*, device: str, quick: bool) -> list[Case]:
    """GEMMs in the dtypes that matter here and, for each kind of memory, a copy too large for any cache."""
    on_gpu = device.startswith("cuda")
    size = 8192 if on_gpu and not quick else 1024
    copied = (1024 if on_gpu else 64) * MIB
    native = on_gpu or has_native_bf16()
    dtype = "bf16" if native else "fp32"  # that a run computes in
    found = [
        _case(
            f"{of} GEMM {size} x {size} x {size}",
            device,
            (GEMM,),
            2.0 * size**3,
            "flop",
            {"size": size, "dtype": of} | ({"rate": "matmul_flops", "rate_per_work": 1} if of == dtype else {}),
        )
        for of in (("bf16",) if on_gpu else ("bf16", "fp32"))
    ]
    # A copy reads and writes.
    copy = {"num_bytes": copied, "rate": "memory_bytes", "rate_per_work": 2}
    found.append(_case(f"device copy {copied // MIB} MiB", device, (COPY,), float(copied), "byte", copy))
    rows = 4096 if on_gpu else 64
    thin = {"num_rows": rows, "vocab_size": VOCAB, "hidden_size": THIN_HIDDEN, "dtype": dtype}
    thin |= {"rate": "loss_logits", "rate_per_work": 1, "repeats": 1}
    found.append(_case(f"loss rows {dtype} N={rows} V={VOCAB}", device, (LOSS_ROWS,), rows * VOCAB, "logit", thin))
    if on_gpu:
        copied = 256 * MIB
        name = f"PCIe copy {copied // MIB} MiB"
        one_way = {"num_bytes": copied, "rate": "link_bytes", "rate_per_work": 1}
        found.append(_case(name, device, HOST_COPIES, float(copied), "byte", one_way))
    return found + _layer_cases(device, dtype, on_gpu=on_gpu)


def _layer_cases(device: str, dtype: str, *, on_gpu: bool) -> list[Case]:
    """What a layer does besides its products with weights, for samples as long as is usual where it runs."""
    samples, length, hidden, heads, head_size = (4, 4096, 4096, 32, 128) if on_gpu else (4, 256, 1024, 16, 64)
    config = LlamaConfig(
        vocab_size=8,
        num_hidden_layers=1,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        head_dim=head_size,
        intermediate_size=4 * hidden,
    )
    layer = shape_of(config, "one layer")
    names = ("hidden_size", "num_heads", "num_kv_heads", "head_size", "intermediate_size")
    sizes = {name: getattr(layer, name) for name in names}
    params = {"num_samples": samples, "length": length, **sizes, "dtype": dtype, "rate_per_work": 1}
    # Backward is two and a half times attention's forward, and twice that of the rest: see kdflow/plan/work.py.
    flops = 3.5 * work.attention_flops(layer, [length] * samples)
    moved = 3.0 * samples * length * work.layer_bytes(layer, ITEM_BYTES[dtype])
    attention, operators = {**params, "rate": "attention_flops"}, {**params, "rate": "operator_bytes"}
    return [
        _case(f"attention {dtype} {samples} x {length}, {heads} heads", device, (ATTENTION,), flops, "flop", attention),
        _case(f"layer {dtype} {samples * length} x {hidden}", device, (OPERATORS,), moved, "byte", operators),
    ]


def _case(
    name: str, device: str, providers: tuple[Provider, ...], work: float, unit: str, params: dict[str, Any]
) -> Case:
    params = {"device": device, "repeats": REPEATS, **params}
    return Case(
        suite="ceilings",
        name=name,
        params=params,
        providers=providers,
        work=params["repeats"] * work,
        unit=unit,
        measures_memory=False,
    )
