"""What the tests of the ring share: children that can be killed, and a record to write."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch

from kdflow.transport.ring import HiddenRing


class Child:
    """A forked process that runs `body` and can be killed."""

    def __init__(self, body: Callable[[], None]) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)

    def join(self) -> int:
        """Exit code, or minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.join()


def write(ring: HiddenRing, ticket: int | None, value: int, shape: tuple[int, ...] = (4, 8)) -> None:
    with ring.reserve(ticket) as slot:
        slot.tensor(shape, torch.bfloat16).fill_(value)
        slot.microbatch_id = value
        slot.tag = -value


def hang(*held: object) -> None:
    """Keeps what it is given until somebody kills the process."""
    time.sleep(60)
