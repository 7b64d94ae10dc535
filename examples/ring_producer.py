"""Hands ten tensors to another process. Prints a handle; start ring_consumer.py with it."""

import torch

from kdflow.transport.ring import HiddenRing

ring = HiddenRing.create(name="example", num_slots=4, slot_bytes=1 << 20)
print("python examples/ring_consumer.py", ring.handle, flush=True)

with HiddenRing.attach(ring.handle, role="producer") as producer:
    producer.wait_for_peer(timeout_s=600)
    for step in range(10):
        with producer.reserve() as slot:  # waits for a free slot
            rows = slot.tensor((256, 1024), torch.bfloat16)  # the slot itself: write in place
            torch.full(rows.shape, float(step), out=rows)
            slot.tag = step
