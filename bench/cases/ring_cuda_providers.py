"""What ``bench ring --device cuda`` runs: the worker is the consumer, its producer a process of its own.

Both use the same GPU. The last message of each repetition is compared with what was sent, after the clock has
stopped.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.cases.ring_cuda_transports import (
    CudaRingTransport,
    CudaTransport,
    OriginalPath,
    PinnedRingTransport,
    Stamps,
    TorchCudaQueue,
)
from bench.cases.ring_providers import PACE_S, TIMEOUT_S, answer, end, latencies
from bench.model import Trial
from bench.timing import quantile

Params = Mapping[str, Any]
START_S = 120.0  # until the producer has imported torch and opened the device


def device_ring(params: Params) -> Trial:
    return transfer_trial(CudaRingTransport, params)


def pinned_ring(params: Params) -> Trial:
    return transfer_trial(PinnedRingTransport, params)


def torch_multiprocessing(params: Params) -> Trial:
    return transfer_trial(TorchCudaQueue, params)


def original_path(params: Params) -> Trial:
    return transfer_trial(OriginalPath, params)


def make_message(params: Params) -> torch.Tensor:
    return torch.arange(params["message_bytes"] // 8, device=params["device"])


def transfer_trial(kind: type[CudaTransport], params: Params) -> Trial:
    """Start the producer of a transport and time what its consumer gets from it."""
    transport = kind(params)
    context = multiprocessing.get_context("spawn")
    command, theirs = context.Pipe()
    process = context.Process(target=produce, args=(kind, transport.endpoint, params, theirs), daemon=True)
    process.start()
    theirs.close()
    transport.open()
    message, kept = make_message(params), make_message(params)
    share = transport.share if params["mode"] == "throughput" else 1.0
    counts = {"idle": params["num_slots"] + 1, "sending": params["num_slots"]}
    count = counts.get(params["mode"]) or max(8, round(share * params["num_messages"]))
    received = 0
    answer(command, START_S)

    def receive_all(each: Callable[[Stamps], None] = lambda _stamps: None) -> None:
        nonlocal received
        for left in reversed(range(count)):
            each(transport.receive(received, TIMEOUT_S, keep=None if left else kept))
            received += 1
        transport.finish()

    def prepare() -> None:
        kept.zero_()
        torch.cuda.synchronize()

    def verify() -> None:
        torch.cuda.synchronize()
        assert torch.equal(kept, message), "the last message is not the one that was sent"

    def throughput() -> dict[str, float]:
        start, cpu = time.perf_counter(), time.process_time()
        command.send((count, 0.0))
        moments: list[float] = []
        receive_all(lambda _stamps: moments.append(time.perf_counter()))
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu
        told = answer(command, TIMEOUT_S)
        verify()
        scale = params["num_messages"] / count
        found = {
            "seconds": seconds * scale,
            "wall_s": seconds,
            "consumer_cpu_s": cpu_s * scale,
            "producer_cpu_s": told["cpu_s"] * scale,
        }
        if isinstance(transport, CudaRingTransport):
            begin, end = count // 4, 3 * count // 4
            middle_bytes = (end - begin) * params["message_bytes"]
            found["steady_gb_s"] = middle_bytes / (moments[end] - moments[begin]) * 1e-9
            found |= {name: told[name] for name in ("put_p50_us", "put_p90_us")}
        return found

    def latency() -> dict[str, float]:
        seconds: list[float] = []
        visible_us: list[float] = []

        def note(stamps: Stamps) -> None:
            seconds.append((time.monotonic_ns() - stamps.sent_ns) * 1e-9)
            if stamps.published_ns is not None and stamps.seen_ns is not None:
                visible_us.append((stamps.seen_ns - stamps.published_ns) * 1e-3)

        start = time.perf_counter()
        command.send((count, PACE_S))
        receive_all(note)
        answer(command, TIMEOUT_S)
        wall_s = time.perf_counter() - start
        verify()
        found = latencies(seconds, wall_s)
        if visible_us:
            found |= {"visible_p50_us": quantile(visible_us, 0.5), "visible_p99_us": quantile(visible_us, 0.99)}
        return found

    def idle() -> dict[str, float]:
        assert isinstance(transport, CudaRingTransport)
        start = time.perf_counter()
        # The producer fills every slot and waits for a free one, then the consumer for a message.
        command.send((count, 0.0))
        time.sleep(1.0)
        receive_all()
        producer_s = answer(command, TIMEOUT_S)["cpu_s"]
        before = time.process_time()
        assert not transport.wait_in_vain(received, 1.0)
        consumer_s = time.process_time() - before
        return {
            "seconds": producer_s + consumer_s,
            "producer_s": producer_s,
            "consumer_s": consumer_s,
            "wall_s": time.perf_counter() - start,
        }

    def sending() -> dict[str, float]:
        """As many messages as there are slots, so that no send waits for a free one."""
        start = time.perf_counter()
        command.send((count, 0.0))
        receive_all()
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "host_percent": answer(command, TIMEOUT_S)["host_percent"]}

    def close() -> None:
        end([command], [process])
        transport.close()

    steps: dict[str, Callable[[], dict[str, float]]] = {
        "throughput": throughput,
        "latency": latency,
        "idle": idle,
        "sending": sending,
    }
    return Trial(steps[params["mode"]], prepare=prepare, close=close, note=transport.note)


def produce(kind: type[CudaTransport], endpoint: Any, params: Params, commands: Connection) -> None:
    """The producer process: told a count and a pace it sends, and answers with its CPU seconds since, the percentage of
    the time that its thread was sending, and how long a ``send`` took. Ends when the consumer is gone."""
    message = make_message(params)
    torch.cuda.synchronize()
    sender = kind.sender(endpoint, params)
    commands.send({})
    number = 0
    while True:
        try:
            count, pace_s = commands.recv()
        except EOFError:
            return
        puts_us: list[float] = []
        begin, start = time.process_time(), time.perf_counter()
        for _ in range(count):
            if pace_s:
                time.sleep(pace_s)
            sent_ns = time.monotonic_ns()
            sender.send(message, number, sent_ns)
            puts_us.append((time.monotonic_ns() - sent_ns) * 1e-3)
            number += 1
        sent_s = time.perf_counter() - start
        sender.finish()
        whole_s = time.perf_counter() - start
        commands.send(
            {
                "cpu_s": time.process_time() - begin,
                "host_percent": 100 * sent_s / whole_s,
                "put_p50_us": quantile(puts_us, 0.5),
                "put_p90_us": quantile(puts_us, 0.9),
            }
        )


def device_copy(params: Params) -> Trial:
    """Copies on the device from one tensor into the slots in turn."""
    source = make_message(params)
    slots = [torch.empty_like(source) for _ in range(params["num_slots"])]

    def step() -> None:
        for number in range(params["num_messages"]):
            slots[number % len(slots)].copy_(source)

    return Trial(step)


def device_copy_with_events(params: Params) -> Trial:
    """The same, each with an event behind it, as a ring needs one to know when a slot may change hands."""
    source = make_message(params)
    slots = [torch.empty_like(source) for _ in range(params["num_slots"])]
    events = [torch.cuda.Event() for _ in slots]

    def step() -> None:
        for number in range(params["num_messages"]):
            slots[number % len(slots)].copy_(source)
            events[number % len(slots)].record()

    return Trial(step)


def pcie_copies(params: Params) -> Trial:
    """Device to pinned host and back to the device, each message's way back beside the next one's way out."""
    source = make_message(params)
    slots = [torch.empty(source.shape, dtype=source.dtype, pin_memory=True) for _ in range(params["num_slots"])]
    targets = [torch.empty_like(source) for _ in range(2)]
    out, back = torch.cuda.Stream(), torch.cuda.Stream()
    written = [torch.cuda.Event() for _ in slots]
    read = [torch.cuda.Event() for _ in slots]

    def step() -> None:
        for number in range(params["num_messages"]):
            slot = number % len(slots)
            with torch.cuda.stream(out):
                out.wait_event(read[slot])
                slots[slot].copy_(source, non_blocking=True)
                written[slot].record()
            with torch.cuda.stream(back):
                back.wait_event(written[slot])
                targets[number % len(targets)].copy_(slots[slot], non_blocking=True)
                read[slot].record()

    return Trial(step)
