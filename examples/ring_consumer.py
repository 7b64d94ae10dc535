"""Reads the tensors of ring_producer.py where they lie: python examples/ring_consumer.py pid:fd:id"""

import sys

from kdflow.transport.ring import HiddenRing

with HiddenRing.attach(sys.argv[1], role="consumer") as consumer:
    for _ in range(10):
        with consumer.receive(timeout_s=60) as slot:
            rows = slot.tensor()  # no copy; valid until the block ends
            total = rows.float().sum().item()
            print(f"{slot.tag}: {tuple(rows.shape)} {rows.dtype}, sum {total:.0f}")
