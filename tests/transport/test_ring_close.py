"""The ends of rings: closed while in use, processes that end, and memory that is no ring at all."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading

import pytest

from kdflow.errors import RingCorrupt, TransportError
from kdflow.transport.ring import HiddenRing
from support.ring import write


@pytest.mark.parametrize("role", ["producer", "consumer"])
@pytest.mark.parametrize("closer", ["thread", "signal handler"])
def test_close_ends_a_wait(ring: HiddenRing, role: str, closer: str) -> None:
    waiting = HiddenRing.attach(ring.handle, role=role)  # pyright: ignore[reportArgumentType]
    if role == "producer":
        for _ in range(ring.num_slots):
            write(waiting, None, 1)
    wait = waiting.reserve if role == "producer" else waiting.receive
    before = signal.signal(signal.SIGALRM, lambda *_: waiting.close())
    try:
        if closer == "thread":
            threading.Timer(0.05, waiting.close).start()
        else:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(TransportError, match="closed") as ended:
            wait(timeout_s=20)
        assert type(ended.value) is TransportError
    finally:
        signal.signal(signal.SIGALRM, before)
    assert ring.peers() == {"producer": (), "consumer": ()}
    HiddenRing.attach(ring.handle, role="consumer").close()  # its place is free


ENDING = """
import threading
from kdflow.errors import RingCorrupt, TransportError
from kdflow.transport.ring import HiddenRing

ring = HiddenRing.create(name="ending", num_slots=4, slot_bytes=64)
producer = HiddenRing.attach(ring.handle, role="producer")
consumer = HiddenRing.attach(ring.handle, role="consumer")

def wait():
    while True:
        try:
            consumer.receive(timeout_s=0.0005)
        except TransportError:
            pass

for _ in range(8):
    threading.Thread(target=wait, daemon=True).start()
sum(range(300_000))  # the main thread has the lock, and ends
"""


def test_threads_that_wait_let_a_process_end() -> None:
    for _ in range(3):
        subprocess.run([sys.executable, "-c", ENDING], check=True, timeout=60)


def test_memory_that_is_no_ring_is_not_filled() -> None:
    fd = os.memfd_create("other", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 << 20)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    with pytest.raises(RingCorrupt, match="magic"):
        HiddenRing.attach(fd, role="producer")
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    os.close(fd)
