"""``bench ring``: hidden states from process to process beside other ways, and memcpy.

Throughput: one producer, which copies its own tensor into each record, and one consumer, which
only views it; the floor is a plain copy of the same bytes. Latency: from right before the send to
the consumer having the record, messages far enough apart that the ring is empty. Idle: CPU time
burnt while each side waits for one second. Producers: four of them, order checked per producer.
On a GPU: ring_cuda.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.cases import ring_cuda
from bench.model import Case, Provider

MODULE = "bench.cases.ring_providers"
KIB, MIB = 2**10, 2**20
SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 16 * MIB)
QUICK_SIZES = (8 * MIB,)

OURS = Provider("kdflow ring", f"{MODULE}:kdflow_ring", "ours")
QUEUES = (
    Provider("multiprocessing.Queue", f"{MODULE}:multiprocessing_queue"),
    Provider("torch.multiprocessing", f"{MODULE}:torch_multiprocessing"),
    Provider("pyzmq ipc", f"{MODULE}:zmq_ipc"),
)
RAY = Provider("ray", f"{MODULE}:ray_objects", env=(("RAY_AUTH_MODE", "disabled"),), apart=True)
COPIES = (
    Provider("memcpy", f"{MODULE}:memcpy", "floor"),
    Provider("torch copy_", f"{MODULE}:torch_copy", "floor"),
)


def cases(*, device: str = "cpu", quick: bool, sizes: Sequence[int] = ()) -> list[Case]:
    """Throughput at each size in bytes, then latency, idle and four producers."""
    if device.startswith("cuda"):
        return ring_cuda.cases(device=device, quick=quick, sizes=sizes)
    sizes = sizes or (QUICK_SIZES if quick else SIZES)
    total = (64 if quick else 256) * MIB
    found = [
        _case(f"throughput {_size(size)}", "throughput", size, (*COPIES, OURS, *QUEUES, RAY), total) for size in sizes
    ]
    found.append(_case("latency 64 KiB", "latency", 64 * KIB, (OURS, *QUEUES, RAY), 200 if quick else 1000))
    found.append(_case("CPU time of 1 s idle on each side", "idle", 64 * KIB, (OURS, *QUEUES[:1])))
    if quick:
        return found
    found.append(_case("4 producers 1 MiB", "throughput", MIB, (*COPIES, OURS, *QUEUES), total, producers=4))
    return found


def _case(
    name: str,
    mode: str,
    message_bytes: int,
    providers: tuple[Provider, ...],
    amount: int = 0,
    *,
    producers: int = 1,
) -> Case:
    """``amount`` is bytes a repetition for throughput, messages for latency."""
    throughput = mode == "throughput"
    num_messages = max(32, amount // message_bytes) if throughput else amount
    return Case(
        suite="ring",
        name=name,
        params={
            "mode": mode,
            "message_bytes": message_bytes,
            "num_messages": num_messages,
            "num_producers": producers,
            "num_slots": 8,
        },
        providers=providers,
        work=float(num_messages * message_bytes) if throughput else 0.0,
        unit="byte" if throughput else "wait",
        worker_mib=800,
        measures_memory=False,
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes // MIB} MiB" if num_bytes >= MIB else f"{num_bytes // KIB} KiB"
