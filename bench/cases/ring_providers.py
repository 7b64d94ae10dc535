"""What ``bench ring`` runs: the worker is the consumer, its producers are processes of their own.

Messages are int64 tensors whose first element is the time right before the send and whose second
is a number that counts the producer's messages up. Every transport is bounded by the same number
of messages under way. One thread copies on each side.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from bench.cases.ring_transports import (
    KdflowRing,
    MultiprocessingQueue,
    TorchMultiprocessing,
    Transport,
    ZmqIpc,
    make_message,
)
from bench.model import Trial
from bench.timing import quantile

Params = Mapping[str, Any]
PACE_S = 0.0005  # between messages when latency is measured
TIMEOUT_S = 60.0


def kdflow_ring(params: Params) -> Trial:
    return transfer_trial(KdflowRing, params)


def multiprocessing_queue(params: Params) -> Trial:
    return transfer_trial(MultiprocessingQueue, params)


def torch_multiprocessing(params: Params) -> Trial:
    return transfer_trial(TorchMultiprocessing, params)


def zmq_ipc(params: Params) -> Trial:
    return transfer_trial(ZmqIpc, params)


def transfer_trial(kind: type[Transport], params: Params) -> Trial:
    """Start the producers of a transport and time what its consumer gets from them."""
    torch.set_num_threads(1)
    # Forked while this process has but one thread: a fresh interpreter would import torch again.
    context = multiprocessing.get_context("fork")
    transport = kind(params)
    commands: list[Connection] = []
    processes = []
    for index in range(params["num_producers"]):
        ours, theirs = context.Pipe()
        commands.append(ours)
        arguments = (kind, transport.endpoint, params, index, theirs, tuple(commands))
        process = context.Process(target=produce, args=arguments, daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    transport.open()
    share = params["num_messages"] // len(commands)
    if params["mode"] == "idle":
        share = params["num_slots"] + 1

    def prepare() -> None:
        for command in commands:
            command.send(share)
        for command in commands:
            answer(command)

    def throughput() -> None:
        for command in commands:
            command.send(0.0)
        counts = [0] * len(commands)
        for _ in range(share * len(commands)):
            _stamp, number = transport.receive(TIMEOUT_S)
            producer, count = number % len(commands), number // len(commands)
            assert count == counts[producer], f"message {count} came, {counts[producer]} was next"
            counts[producer] += 1
        for command in commands:
            answer(command)

    def latency() -> dict[str, float]:
        start = time.perf_counter()
        commands[0].send(PACE_S)
        seconds = []
        for _ in range(params["num_messages"]):
            stamp, _number = transport.receive(TIMEOUT_S)
            seconds.append((time.monotonic_ns() - stamp) * 1e-9)
        answer(commands[0])
        return latencies(seconds, time.perf_counter() - start)

    def idle() -> dict[str, float]:
        start = time.perf_counter()
        # The producer fills every slot and waits for a free one, then the consumer for a message.
        commands[0].send(0.0)
        time.sleep(1.0)
        for _ in range(share):
            transport.receive(TIMEOUT_S)
        producer_s = answer(commands[0])
        before = time.process_time()
        assert not transport.wait_in_vain(1.0)
        consumer_s = time.process_time() - before
        return {
            "seconds": producer_s + consumer_s,
            "producer_s": producer_s,
            "consumer_s": consumer_s,
            "wall_s": time.perf_counter() - start,
        }

    def close() -> None:
        end(commands, processes)
        transport.close()

    steps: dict[str, Callable[[], Mapping[str, float] | None]] = {
        "throughput": throughput,
        "latency": latency,
        "idle": idle,
    }
    return Trial(steps[params["mode"]], prepare=prepare, close=close)


def produce(
    kind: type[Transport],
    endpoint: Any,
    params: Params,
    index: int,
    commands: Connection,
    inherited: tuple[Connection, ...],
) -> None:
    """A producer process: told a count it prepares the sources, told a pace it sends them, and
    answers each with its CPU seconds since. Ends when the consumer is gone."""
    for connection in inherited:
        connection.close()  # else it would keep its own pipe open, and outlive the consumer
    sender = kind.sender(endpoint)
    producers = params["num_producers"]
    ticket = index
    while True:
        try:
            count = commands.recv()
            sources = sender.num_sources(count)
            messages = [make_message(params["message_bytes"]) for _ in range(sources)]
            stamps = [message.numpy() for message in messages]  # torch takes microseconds to set an element
            commands.send(0.0)
            pace_s = commands.recv()
        except EOFError:
            return
        begin = time.process_time()
        for number in range(count):
            if pace_s:
                time.sleep(pace_s)
            stamp = stamps[number % len(stamps)]
            stamp[:2] = time.monotonic_ns(), number * producers + index
            sender.send(messages[number % len(messages)], ticket)
            ticket += producers
        commands.send(time.process_time() - begin)


def answer(command: Connection, timeout_s: float = TIMEOUT_S) -> Any:
    """What a producer says it did, once it has done it."""
    if not command.poll(timeout_s):
        raise TimeoutError(f"a producer gave no answer within {timeout_s:.0f} s")
    return command.recv()


def end(commands: Sequence[Connection], processes: Sequence[BaseProcess]) -> None:
    """The producers leave when their commands end."""
    for command in commands:
        command.close()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()


def latencies(seconds: list[float], wall_s: float) -> dict[str, float]:
    return {
        "seconds": quantile(seconds, 0.5),
        "p50_us": 1e6 * quantile(seconds, 0.5),
        "p99_us": 1e6 * quantile(seconds, 0.99),
        "wall_s": wall_s,
    }


def ray_objects(params: Params) -> Trial:
    """A producer actor returns each message as an object in the store, the driver views it."""
    import numpy as np
    import ray

    in_flight = params["num_slots"]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=max(256 * 2**20, 4 * in_flight * params["message_bytes"]),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )

    @ray.remote(num_cpus=1)
    class Producer:
        def __init__(self) -> None:
            self.message = np.array(make_message(params["message_bytes"]).numpy())

        def produce(self, number: int) -> np.ndarray:
            self.message[:2] = time.monotonic_ns(), number
            return self.message

    producer = Producer.remote()  # pyright: ignore[reportAttributeAccessIssue]

    def receive_one(reference: Any, number: int) -> int:
        message = ray.get(reference, timeout=TIMEOUT_S)
        assert message[1] == number
        return int(message[0])

    def throughput() -> None:
        pending: deque[tuple[Any, int]] = deque()
        for number in range(params["num_messages"]):
            if len(pending) == in_flight:
                receive_one(*pending.popleft())
            pending.append((producer.produce.remote(number), number))
        while pending:
            receive_one(*pending.popleft())

    def latency() -> dict[str, float]:
        start = time.perf_counter()
        seconds = []
        for number in range(params["num_messages"]):
            time.sleep(PACE_S)
            stamp = receive_one(producer.produce.remote(number), number)
            seconds.append((time.monotonic_ns() - stamp) * 1e-9)
        return latencies(seconds, time.perf_counter() - start)

    receive_one(producer.produce.remote(0), 0)  # waits until the actor has started
    step = {"throughput": throughput, "latency": latency}[params["mode"]]
    return Trial(step, close=ray.shutdown)


def memcpy(params: Params) -> Trial:
    """libc's memmove from one buffer into the slots of a ring in turn."""
    source, slots = _copy_buffers(params)
    addresses = [slot.data_ptr() for slot in slots]
    size, begin = params["message_bytes"], source.data_ptr()

    def step() -> None:
        for number in range(params["num_messages"]):
            ctypes.memmove(addresses[number % len(addresses)], begin, size)
        assert slots[0][1] == source[1]  # keeps the buffers alive

    return Trial(step)


def torch_copy(params: Params) -> Trial:
    """The same with ``Tensor.copy_`` in one thread."""
    source, slots = _copy_buffers(params)

    def step() -> None:
        for number in range(params["num_messages"]):
            slots[number % len(slots)].copy_(source)

    return Trial(step)


def _copy_buffers(params: Params) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.set_num_threads(1)
    source = make_message(params["message_bytes"])
    return source, [make_message(params["message_bytes"]) for _ in range(params["num_slots"])]
