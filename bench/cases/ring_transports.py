"""Ways to hand a tensor to another process, behind one small interface.

A transport lives in the consumer; ``endpoint`` goes to the producers, where ``sender`` opens it.
"""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

Params = Mapping[str, Any]


def make_message(num_bytes: int) -> torch.Tensor:
    """An int64 tensor whose pages are all touched."""
    return torch.arange(num_bytes // 8)


def header(message: Any) -> tuple[int, int]:
    """The time and number that a message begins with: all that the consumer looks at."""
    return int(message[0]), int(message[1])


class Sender(ABC):
    """The producer's end."""

    @abstractmethod
    def send(self, message: torch.Tensor, ticket: int) -> None:
        """Hand over a copy of ``message``, which the producer will overwrite."""

    def num_sources(self, count: int) -> int:
        """How many tensors to prepare for ``count`` sends; one is overwritten again and again."""
        return min(1, count)


class Transport(ABC):
    endpoint: Any

    @abstractmethod
    def __init__(self, params: Params): ...

    def open(self) -> None:
        """Open the consumer's end; called after the producers were forked."""
        return None

    @staticmethod
    @abstractmethod
    def sender(endpoint: Any) -> Sender: ...

    @abstractmethod
    def receive(self, timeout_s: float) -> tuple[int, int]:
        """The header of the next message."""

    @abstractmethod
    def wait_in_vain(self, timeout_s: float) -> bool:
        """Wait for a message that does not come; whether one came."""

    def close(self) -> None:
        return None


class KdflowRing(Transport):
    """Consumer-owned tickets: producer i of n fills the tickets i, i + n, i + 2n, ..."""

    def __init__(self, params: Params):
        from kdflow.transport.ring import HiddenRing

        self._ring = HiddenRing.create(name="bench", num_slots=params["num_slots"], slot_bytes=params["message_bytes"])
        self.endpoint = self._ring.handle
        self._ticket = 0

    def open(self) -> None:
        self._consumer = type(self._ring).attach(self.endpoint, role="consumer")

    @staticmethod
    def sender(endpoint: Any) -> Sender:
        return _RingSender(endpoint)

    def receive(self, timeout_s: float) -> tuple[int, int]:
        with self._consumer.receive(self._ticket, timeout_s=timeout_s) as slot:
            self._ticket += 1
            return header(slot.tensor())

    def wait_in_vain(self, timeout_s: float) -> bool:
        from kdflow.errors import RingTimeout

        try:
            self._consumer.receive(self._ticket, timeout_s=timeout_s)
        except RingTimeout:
            return False
        return True

    def close(self) -> None:
        self._consumer.close()
        self._ring.close()


class _RingSender(Sender):
    def __init__(self, endpoint: Any):
        from kdflow.transport.ring import HiddenRing

        self._ring = HiddenRing.attach(endpoint, role="producer")

    def send(self, message: torch.Tensor, ticket: int) -> None:
        self._ring.put(message, ticket)


class MultiprocessingQueue(Transport):
    """The standard library's queue with numpy arrays: pickled, written to a pipe, unpickled."""

    def __init__(self, params: Params):
        self.endpoint = multiprocessing.get_context("fork").Queue(params["num_slots"])

    @staticmethod
    def sender(endpoint: Any) -> Sender:
        return _QueueSender(endpoint)

    def receive(self, timeout_s: float) -> tuple[int, int]:
        return header(self.endpoint.get(timeout=timeout_s))

    def wait_in_vain(self, timeout_s: float) -> bool:
        try:
            self.endpoint.get(timeout=timeout_s)
        except queue.Empty:
            return False
        return True


class _QueueSender(Sender):
    def __init__(self, endpoint: Any):
        self._queue = endpoint

    def num_sources(self, count: int) -> int:
        # put() pickles later, in a thread: a source overwritten at once would arrive changed.
        return count

    def send(self, message: torch.Tensor, ticket: int) -> None:
        self._queue.put(message.numpy())


class TorchMultiprocessing(MultiprocessingQueue):
    """torch's queue: put() moves the storage into shared memory and sends its file descriptor."""

    def __init__(self, params: Params):
        self.endpoint = torch.multiprocessing.get_context("fork").Queue(params["num_slots"])

    @staticmethod
    def sender(endpoint: Any) -> Sender:
        return _TorchSender(endpoint)


class _TorchSender(_QueueSender):
    # A tensor once put stays shared: each send needs a fresh one, as a teacher's forward makes it.
    def send(self, message: torch.Tensor, ticket: int) -> None:
        self._queue.put(message)


class ZmqIpc(Transport):
    """PUSH/PULL over a Unix socket, without copies inside pyzmq on either side."""

    def __init__(self, params: Params):
        self._folder = tempfile.TemporaryDirectory()
        self._limit = params["num_slots"]
        self.endpoint = f"ipc://{Path(self._folder.name) / 'bench'}"

    def open(self) -> None:
        import zmq

        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, self._limit)
        self._socket.bind(self.endpoint)

    @staticmethod
    def sender(endpoint: Any) -> Sender:
        return _ZmqSender(endpoint)

    def receive(self, timeout_s: float) -> tuple[int, int]:
        if not self._socket.poll(int(1000 * timeout_s)):
            raise TimeoutError(f"no message within {timeout_s} s")
        frame = self._socket.recv(copy=False)
        return header(torch.frombuffer(frame.buffer, dtype=torch.int64))

    def wait_in_vain(self, timeout_s: float) -> bool:
        return bool(self._socket.poll(int(1000 * timeout_s)))

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
        self._folder.cleanup()


class _ZmqSender(Sender):
    def __init__(self, endpoint: Any):
        import zmq

        self._socket = zmq.Context.instance().socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 8)
        self._socket.connect(endpoint)

    def num_sources(self, count: int) -> int:
        return count  # sent without a copy, so the socket reads the source later

    def send(self, message: torch.Tensor, ticket: int) -> None:
        self._socket.send(message.numpy(), copy=False)
