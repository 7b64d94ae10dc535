"""Sustained traffic with kills: python tests/transport/soak.py --minutes 10

Three producers, one consumer and a supervisor, all forked. Producers write free-running records whose
bytes follow from their ticket; about twice a second one of the processes is killed and started again.
The run fails when a record is wrong or delivered twice by one consumer, when more records are lost
than producers died, when nothing moves for ten seconds, or when the supervisor's memory or descriptors
grow.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import time
from pathlib import Path

from kdflow.errors import PeerDied, RingTimeout
from kdflow.transport.ring import HiddenRing

NUM_PRODUCERS = 3
SLOT_BYTES = 1 << 18


def pattern(ticket: int) -> bytes:
    return random.Random(ticket).randbytes(64)


def produce(handle: str) -> None:
    ring = HiddenRing.attach(handle, role="producer")
    while True:
        try:
            with ring.reserve(timeout_s=10) as slot:
                nbytes = 64 * (1 + slot.ticket % (SLOT_BYTES // 64))
                slot.buffer(nbytes)[:] = pattern(slot.ticket) * (nbytes // 64)
        except PeerDied:  # the consumer will be back
            continue


def consume(handle: str) -> None:
    ring = HiddenRing.attach(handle, role="consumer")
    last = -1
    while True:
        try:
            with ring.receive(timeout_s=10) as slot:
                repeats = slot.nbytes // 64
                if bytes(slot.buffer()) != pattern(slot.ticket) * repeats or slot.ticket <= last:
                    raise SystemExit(f"ticket {slot.ticket} after {last}: wrong bytes or wrong order")
                last = slot.ticket
        except PeerDied:  # one record lost, or all producers gone for a moment
            continue


def start(body, handle: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body(handle)
    except RingTimeout as error:
        print(error, file=sys.stderr)
    except SystemExit as error:
        print(error.code, file=sys.stderr)
    finally:
        os._exit(status)


def resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(minutes: float, seed: int) -> int:
    rng = random.Random(seed)
    ring = HiddenRing.create(name="soak", num_slots=4, slot_bytes=SLOT_BYTES, checksum=True)
    children = {start(consume, ring.handle): consume}
    children |= {start(produce, ring.handle): produce for _ in range(NUM_PRODUCERS)}
    kills = {consume: 0, produce: 0}
    baseline = (resident_mib(), len(os.listdir("/proc/self/fd")))
    begun = last_line = time.monotonic()
    last_received = -1
    failure = None
    while failure is None and time.monotonic() - begun < 60 * minutes:
        time.sleep(rng.uniform(0.1, 0.9))
        victim = rng.choice(list(children))
        os.kill(victim, signal.SIGKILL)
        body = children.pop(victim)
        status = os.waitstatus_to_exitcode(os.waitpid(victim, 0)[1])
        if status != -signal.SIGKILL:
            failure = f"a {body.__name__} process ended by itself with {status}"
        kills[body] += 1
        children[start(body, ring.handle)] = body
        if time.monotonic() - last_line < min(10.0, 20 * minutes):
            continue
        last_line = time.monotonic()
        stats = ring.stats()
        print(
            f"{last_line - begun:6.0f} s  {stats.consumers.records} records, "
            f"{stats.consumers.bytes / 2**30:.1f} GiB, {stats.lost} lost, kills: "
            f"{kills[produce]} producers, {kills[consume]} consumers; {resident_mib():.0f} MiB",
            flush=True,
        )
        if stats.consumers.records == last_received:
            failure = "nothing moves"
        if stats.lost > kills[produce]:
            failure = "more records lost than producers killed"
        last_received = stats.consumers.records
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status != -signal.SIGKILL:
            failure = failure or f"a process ended by itself with {status}"
    if resident_mib() > baseline[0] + 16 or len(os.listdir("/proc/self/fd")) > baseline[1] + NUM_PRODUCERS + 1:
        failure = failure or f"grew from {baseline}"
    print(failure or "sound")
    return 0 if failure is None else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(run(options.minutes, options.seed))
