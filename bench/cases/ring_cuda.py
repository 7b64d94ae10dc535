"""The cases of ``bench ring --device cuda``: records from GPU memory to GPU memory, process to process.

Device ring: the floor is a copy on the device; the consumer only looks, as the slot is its own memory. Beside it the
same copies with an event behind each, which is what a ring adds for the device at least. Pinned ring: the floor is both
PCIe copies, overlapped; the consumer's copy back to the device is part of the job. At the first size there are
torch.multiprocessing's CUDA tensors and the original path, too: device, host, socket, numpy, device. Ours tell how long
a call of the producer's takes (``put_p50_us``, ``put_p90_us``) and the rate between the first and the last quarter of
the records (``steady_gb_s``). Latency: from a record's publication to the consumer holding it (``visible_p50_us``), and
from right before its copy is enqueued to the consumer's stream being able to use it (``p50_us``). Sending: into free
slots, which share of the time until all copies are done the sending thread takes; one that is blocked by them takes
all. What decides comes first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.model import Case, Provider

MODULE = "bench.cases.ring_cuda_providers"
GATHER = "bench.cases.ring_cuda_gather"
KIB, MIB, GIB = 2**10, 2**20, 2**30
SIZES = (16 * MIB, 64 * MIB, 4 * MIB, MIB)
QUICK_SIZES = (16 * MIB,)
MAX_MESSAGES = 4096

OURS = {
    "device": Provider("kdflow device ring", f"{MODULE}:device_ring", "ours"),
    "pinned": Provider("kdflow pinned ring", f"{MODULE}:pinned_ring", "ours"),
}
EVENTS = Provider("device copy, an event behind each", f"{MODULE}:device_copy_with_events", "bound")
FLOORS = {
    "device": Provider("device copy", f"{MODULE}:device_copy", "floor"),
    "pinned": Provider("PCIe copies", f"{MODULE}:pcie_copies", "floor"),
}
PEERS = (
    Provider("torch.multiprocessing", f"{MODULE}:torch_multiprocessing"),
    Provider("original path", f"{MODULE}:original_path"),
)
PACKING = (
    Provider("copy of as many bytes", f"{GATHER}:copy", "floor"),
    Provider("index_select into the slot", f"{GATHER}:index_select", "ours"),
    Provider("gathered, then copied", f"{GATHER}:gather_then_copy"),
    Provider("Triton kernel", f"{GATHER}:kernel"),
)
# Of a repetition: enough for the time to begin and end not to count.
AMOUNTS = {"device": 64 * GIB, "pinned": 4 * GIB}


def cases(*, device: str, quick: bool, sizes: Sequence[int] = ()) -> list[Case]:
    """Throughput at 16 MiB and latency of both rings, sending, packing, the other sizes, then CPU time at rest.

    Their processes go on from case to case: a start takes as long as measuring."""
    first, *others = sizes or (QUICK_SIZES if quick else SIZES)
    found = [
        _throughput("device", first, device, PEERS),
        _latency("device", device, quick=quick),
        _throughput("pinned", first, device, PEERS),
        _latency("pinned", device, quick=quick),
        _case("pinned ring, sending 8 x 64 MiB", "sending", 64 * MIB, device, (OURS["pinned"],)),
        _packing(device),
    ]
    found += [_throughput(placement, size, device) for size in others for placement in OURS]
    if not quick:
        found.append(_case("device ring, CPU time of 1 s idle on each side", "idle", MIB, device, (OURS["device"],)))
    return [replace(case, worker_pool="ring") for case in found]


def _throughput(placement: str, message_bytes: int, device: str, peers: tuple[Provider, ...] = ()) -> Case:
    num_messages = min(MAX_MESSAGES, AMOUNTS[placement] // message_bytes)
    size = f"{message_bytes // MIB} MiB" if message_bytes >= MIB else f"{message_bytes // KIB} KiB"
    bounds = (EVENTS,) if placement == "device" else ()
    providers = (FLOORS[placement], *bounds, OURS[placement], *peers)
    return _case(f"{placement} ring, {size}", "throughput", message_bytes, device, providers, num_messages)


def _latency(placement: str, device: str, *, quick: bool) -> Case:
    providers = (OURS[placement], *PEERS)
    return _case(f"{placement} ring, latency 64 KiB", "latency", 64 * KIB, device, providers, 200 if quick else 300)


def _packing(device: str) -> Case:
    num_rows, hidden_size, num_messages = 4096, 4096, 256
    return Case(
        suite="ring",
        name=f"loss rows packed into a slot, {num_rows} x {hidden_size} bf16",
        params={
            "num_rows": num_rows,
            "hidden_size": hidden_size,
            "num_messages": num_messages,
            "num_slots": 8,
            "device": device,
        },
        providers=PACKING,
        work=float(num_messages * num_rows * hidden_size * 2),
        unit="byte",
        measures_memory=False,
    )


def _case(
    name: str, mode: str, message_bytes: int, device: str, providers: tuple[Provider, ...], num_messages: int = 0
) -> Case:
    return Case(
        suite="ring",
        name=name,
        params={
            "mode": mode,
            "message_bytes": message_bytes,
            "num_messages": num_messages,
            "num_slots": 8,
            "device": device,
        },
        providers=providers,
        work=float(num_messages * message_bytes) if mode == "throughput" else 0.0,
        unit="byte" if mode == "throughput" else "wait",
        measures_memory=False,
    )
