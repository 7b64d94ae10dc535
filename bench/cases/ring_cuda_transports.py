"""Ways to hand a tensor on a GPU to another process that uses the same GPU, behind one small interface.

A transport lives in the consumer; ``endpoint`` goes to the producer, where ``sender`` opens it.
"""

from __future__ import annotations

import multiprocessing.connection
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

Params = Mapping[str, Any]


class Stamps(NamedTuple):
    """Of a message, by time.monotonic_ns(): right before its copy was enqueued; where told, when it was published, and
    when its consumer held it."""

    sent_ns: int
    published_ns: int | None = None
    seen_ns: int | None = None


class CudaSender(ABC):
    @abstractmethod
    def send(self, message: torch.Tensor, number: int, stamp: int) -> None:
        """Hand over a copy of ``message`` with the time ``stamp``; returns when the copy is enqueued or made."""

    def finish(self) -> None:
        """Wait until everything sent is on its way."""
        torch.cuda.synchronize()


class CudaTransport(ABC):
    endpoint: Any
    note = ""
    # Of the case's messages so many are sent, and the time is scaled: for ways too slow to wait for.
    share = 1.0

    @abstractmethod
    def __init__(self, params: Params): ...

    def open(self) -> None:
        """Open the consumer's end; called after the producer was started."""
        return None

    @staticmethod
    @abstractmethod
    def sender(endpoint: Any, params: Params) -> CudaSender: ...

    @abstractmethod
    def receive(self, number: int, timeout_s: float, *, keep: torch.Tensor | None = None) -> Stamps:
        """The stamps of the next message, once this process's stream may use it; its data goes into ``keep``."""

    def finish(self) -> None:
        """Wait until all is received and given back."""
        torch.cuda.synchronize()

    def close(self) -> None:
        return None


class CudaRingTransport(CudaTransport):
    placement = "device"

    def __init__(self, params: Params):
        from kdflow.transport import CudaRing

        self._params = params
        self._ring = CudaRing.create(
            name="bench",
            num_slots=params["num_slots"],
            slot_bytes=params["message_bytes"],
            placement=self.placement,  # pyright: ignore[reportArgumentType]
        )
        self.endpoint = self._ring.handle

    def open(self) -> None:
        self._consumer = type(self._ring).attach(self.endpoint, role="consumer", device=self._params["device"])
        self._stream = torch.cuda.Stream()

    @staticmethod
    def sender(endpoint: Any, params: Params) -> CudaSender:
        return _RingSender(endpoint, params)

    def receive(self, number: int, timeout_s: float, *, keep: torch.Tensor | None = None) -> Stamps:
        with self._consumer.receive(number, timeout_s=timeout_s, stream=self._stream) as slot:
            seen_ns = time.monotonic_ns()
            if keep is not None:
                slot.copy_to(keep)
            return Stamps(slot.tag, slot.committed_ns, seen_ns)

    def wait_in_vain(self, number: int, timeout_s: float) -> bool:
        """Wait for a message that does not come; whether one came."""
        from kdflow.errors import RingTimeout

        try:
            self._consumer.receive(number, timeout_s=timeout_s)
        except RingTimeout:
            return False
        return True

    def finish(self) -> None:
        self._consumer.synchronize()

    def close(self) -> None:
        self._consumer.close(grace_s=1.0)
        self._ring.close()


class PinnedRingTransport(CudaRingTransport):
    """As above, and each record is copied to the device again."""

    placement = "pinned"

    def open(self) -> None:
        super().open()
        size = self._params["message_bytes"] // 8
        self._targets = [torch.empty(size, dtype=torch.int64, device=self._params["device"]) for _ in range(2)]

    def receive(self, number: int, timeout_s: float, *, keep: torch.Tensor | None = None) -> Stamps:
        target = self._targets[number % len(self._targets)] if keep is None else keep
        return super().receive(number, timeout_s, keep=target)


class _RingSender(CudaSender):
    def __init__(self, endpoint: Any, params: Params):
        from kdflow.transport import CudaRing

        self._ring = CudaRing.attach(endpoint, role="producer", device=params["device"])
        self._stream = torch.cuda.Stream()

    def send(self, message: torch.Tensor, number: int, stamp: int) -> None:
        self._ring.put(message, number, tag=stamp, timeout_s=60.0, stream=self._stream)

    def finish(self) -> None:
        self._ring.synchronize()


class TorchCudaQueue(CudaTransport):
    """torch's queue: put() sends the CUDA IPC handle of a tensor that its producer will not touch again."""

    share = 1 / 4

    def __init__(self, params: Params):
        self.endpoint = torch.multiprocessing.get_context("spawn").Queue(params["num_slots"])

    @staticmethod
    def sender(endpoint: Any, params: Params) -> CudaSender:
        return _TorchSender(endpoint)

    def receive(self, number: int, timeout_s: float, *, keep: torch.Tensor | None = None) -> Stamps:
        stamp, tensor = self.endpoint.get(timeout=timeout_s)
        if keep is not None:
            keep.copy_(tensor)
            torch.cuda.synchronize()
        return Stamps(stamp)


class _TorchSender(CudaSender):
    def __init__(self, endpoint: Any):
        self._queue = endpoint

    def send(self, message: torch.Tensor, number: int, stamp: int) -> None:
        self._queue.put((stamp, message.clone()))


class OriginalPath(CudaTransport):
    """Device to host, a copy by numpy, a ZeroMQ socket, a copy by numpy, host to device."""

    share = 1 / 32

    def __init__(self, params: Params):
        self._params = params
        self._folder = tempfile.TemporaryDirectory()
        self.endpoint = str(Path(self._folder.name) / "bench")
        try:
            import zmq  # noqa: F401
        except ImportError:
            self.note = "without pyzmq: a Unix socket in its place"

    def open(self) -> None:
        if self.note:
            self._listener = multiprocessing.connection.Listener(self.endpoint, "AF_UNIX")
            self._connection = self._listener.accept()
            return
        import zmq

        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, self._params["num_slots"])
        self._socket.bind(f"ipc://{self.endpoint}")

    @staticmethod
    def sender(endpoint: Any, params: Params) -> CudaSender:
        return _SocketSender(endpoint)

    def receive(self, number: int, timeout_s: float, *, keep: torch.Tensor | None = None) -> Stamps:
        import numpy as np

        channel = self._connection if self.note else self._socket
        if not channel.poll(timeout_s if self.note else int(1000 * timeout_s)):  # pyright: ignore
            raise TimeoutError(f"no message within {timeout_s} s")
        payload = channel.recv_bytes() if self.note else channel.recv()  # pyright: ignore
        array = np.frombuffer(payload, np.int64).copy()
        tensor = torch.from_numpy(array[1:]).to(self._params["device"])
        if keep is not None:
            keep.copy_(tensor)
        return Stamps(int(array[0]))

    def close(self) -> None:
        if self.note:
            self._connection.close()
            self._listener.close()
        else:
            self._socket.close(linger=0)
            self._context.term()
        self._folder.cleanup()


class _SocketSender(CudaSender):
    def __init__(self, endpoint: str):
        try:
            import zmq
        except ImportError:
            self._send = _connect(endpoint).send_bytes
        else:
            socket = zmq.Context.instance().socket(zmq.PUSH)
            socket.setsockopt(zmq.SNDHWM, 8)
            socket.connect(f"ipc://{endpoint}")
            self._send = socket.send

    def send(self, message: torch.Tensor, number: int, stamp: int) -> None:
        array = message.cpu().numpy()
        self._send(stamp.to_bytes(8, "little") + array.tobytes())


def _connect(endpoint: str) -> Any:
    deadline = time.monotonic() + 60
    while True:
        try:
            return multiprocessing.connection.Client(endpoint, "AF_UNIX")
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
