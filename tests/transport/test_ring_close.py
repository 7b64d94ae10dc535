"""The ends of rings: closed while in use, processes that end; memory that is no ring, or not any more, or too much."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kdflow.errors import RingCorrupt, TransportError
from kdflow.transport.ring import HiddenRing
from support.ring import Child, write


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


def test_handle_of_a_ring_that_was_closed(tmp_path: Path) -> None:
    """Its descriptor is another's by now."""
    first = HiddenRing.create(name="first", num_slots=1, slot_bytes=64)
    handle, fd = first.handle, first.fileno()
    del first
    second = HiddenRing.create(name="second", num_slots=1, slot_bytes=64)
    assert second.fileno() == fd
    with pytest.raises(TransportError, match=rf"ring handle {handle}: .* found the ring second in its place; ask for"):
        HiddenRing.attach(handle, role="producer")
    assert second.stats().producers.attached == 0
    del second
    with (tmp_path / "file").open("w") as file:
        assert file.fileno() == fd
        with pytest.raises(TransportError, match=rf"ring handle {handle}: .* found another file in its place"):
            HiddenRing.attach(handle, role="producer")
    with pytest.raises(TransportError, match=rf"cannot open ring handle {handle}"):
        HiddenRing.attach(handle, role="producer")


def test_more_memory_than_there_is_is_an_error() -> None:
    """Not the end of this process, or of others, by the kernel; the child is the first that it would choose."""

    def create() -> None:
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
        with pytest.raises(
            TransportError, match=r"large: cannot allocate \d+ bytes .* only \d+ are available, .*; use fewer"
        ):
            HiddenRing.create(name="large", num_slots=8, slot_bytes=1 << 40)

    assert Child(create).join() == 0
