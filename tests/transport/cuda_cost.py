"""What a record of the CUDA ring costs the host: PYTHONPATH=tests python -m transport.cuda_cost

It runs on the fake driver (tests/support/fake_cuda.cpp), whose copies move nothing and take a set time, so that what is
left is the ring's own: no GPU, and no figure of one. `calls` is the time of the calling threads, of records that wait
for a copy; `latency` the way of a record to another process, with pauses between records; `idle` the CPU time of both
sides while nothing comes. Medians over repetitions, and the least in brackets.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdflow.errors import RingTimeout
from kdflow.transport import CudaRing
from support import fake_cuda
from support.fake_cuda import FakeArray, FakeStream
from support.processes import Spawned, say

COPY_NS = 8_000  # as of 64 KiB, launch included, by order of magnitude
PACES_US = (50, 200, 500, 2_000)
BATCH = 256


def in_block(ring: CudaRing, array: FakeArray, ticket: int, stamp: int, stream: FakeStream) -> None:
    with ring.reserve(ticket, timeout_s=60, stream=stream) as slot:
        slot.copy_from(array)
        slot.tag = stamp


def in_one_call(ring: CudaRing, array: FakeArray, ticket: int, stamp: int, stream: FakeStream) -> None:
    ring.put(array, ticket, tag=stamp, timeout_s=60, stream=stream)


WAYS = {"reserve, copy_from, commit": in_block, "put": in_one_call}


def per_record(work: Callable[[int], object], first: int) -> float:
    start = time.perf_counter_ns()
    for ticket in range(first, first + BATCH):
        work(ticket)
    return (time.perf_counter_ns() - start) / BATCH / 1000


def measure_calls(num_repetitions: int) -> None:
    """Producer and consumer take turns in one thread, so that nobody waits in a call."""
    with CudaRing.create(name="cost", num_slots=BATCH, slot_bytes=4096, placement="device") as made:
        others = set(os.listdir("/proc/self/task"))
        producer = CudaRing.attach(made.handle, role="producer")
        (thread,) = (Path("/proc/self/task") / task for task in set(os.listdir("/proc/self/task")) - others)
        consumer = CudaRing.attach(made.handle, role="consumer")
        array, stream, ticket = FakeArray(np.zeros(512)), FakeStream(), 0
        found: dict[str, list[float]] = {name: [] for name in (*WAYS, "receive, release", "completer, CPU")}

        def take(ticket: int) -> int:
            with consumer.receive(ticket, timeout_s=60, stream=stream) as slot:
                return slot.tag

        for _ in range(num_repetitions):
            for name, way in WAYS.items():
                before = cpu_us(thread)
                found[name].append(per_record(lambda n, way=way: way(producer, array, n, n, stream), ticket))
                producer.synchronize()
                found["completer, CPU"].append((cpu_us(thread) - before) / BATCH)
                found["receive, release"].append(per_record(take, ticket))
                ticket += BATCH
        for name, values in found.items():
            say(f"{name:28} {statistics.median(values):6.2f} us ({min(values):.2f})")
        producer.close()
        consumer.close()
    say("end")


def cpu_us(thread: Path) -> float:
    return int((thread / "schedstat").read_text().split()[0]) / 1000


def send_paced(handle: str, way: str, num_records: int) -> None:
    with CudaRing.attach(handle, role="producer") as producer:
        array, stream, ticket = FakeArray(np.zeros(512)), FakeStream(), 0
        for pace_us in PACES_US:
            for _ in range(num_records):
                time.sleep(pace_us * 1e-6)
                WAYS[way](producer, array, ticket, time.monotonic_ns(), stream)
                ticket += 1
        producer.synchronize()


def measure_latency(way: str, num_records: int) -> None:
    with CudaRing.create(name="cost", num_slots=8, slot_bytes=4096, placement="device") as made:
        consumer = CudaRing.attach(made.handle, role="consumer")
        child = Spawned(send_paced, made.handle, way, num_records)
        ticket = 0
        for pace_us in PACES_US:
            usable: list[float] = []
            visible: list[float] = []
            cpu = time.process_time()
            for _ in range(num_records):
                with consumer.receive(ticket, timeout_s=60) as slot:
                    now = time.monotonic_ns()
                    usable.append((now - slot.tag) / 1000)
                    visible.append((now - slot.committed_ns) / 1000)
                ticket += 1
            cpu_share = (time.process_time() - cpu) / (num_records * pace_us * 1e-6)
            say(
                f"{way}, {pace_us} us between records: usable {statistics.median(usable):.1f} us ({min(usable):.1f}), "
                f"visible {statistics.median(visible):.1f} us ({min(visible):.1f}), "
                f"consumer's CPU {100 * min(cpu_share, 1):.0f}%"
            )
        assert child.join() == 0
        consumer.close()
    say("end")


def measure_idle() -> None:
    with CudaRing.create(name="cost", num_slots=2, slot_bytes=4096, placement="device") as made:
        consumer = CudaRing.attach(made.handle, role="consumer")
        producer = CudaRing.attach(made.handle, role="producer")
        array, stream = FakeArray(np.zeros(512)), FakeStream()
        for ticket in range(64):  # a stream of records, and then none
            producer.put(array, ticket, stream=stream)
            consumer.receive(ticket, timeout_s=60).release()

        def wait_in_vain(ticket: int) -> None:
            try:
                consumer.receive(ticket, timeout_s=1.0)
            except RingTimeout:
                return
            raise AssertionError("a record came that nobody sent")

        cpu = time.process_time()
        waiting = threading.Thread(target=wait_in_vain, args=(64,))
        waiting.start()
        waiting.join()
        say(f"one second of waiting: {1000 * (time.process_time() - cpu):.2f} ms of CPU time")
        producer.close()
        consumer.close()
    say("end")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200, help="of batches of records, for the cost of calls")
    parser.add_argument("--records", type=int, default=400, help="a pace, for latency")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        env = {"KDFLOW_CUDA_DRIVER": str(fake_cuda.build(Path(folder))), "FAKE_CUDA_COPY_NS": str(COPY_NS)}
        jobs = [(measure_calls, options.repetitions), (measure_idle,)]
        jobs += [(measure_latency, way, options.records) for way in WAYS]
        for function, *arguments in jobs:
            child = Spawned(f"transport.cuda_cost:{function.__name__}", *arguments, env=env)
            while (line := child.line(timeout_s=300)) != "end":
                print(line)
            assert child.join() == 0


if __name__ == "__main__":
    main()
