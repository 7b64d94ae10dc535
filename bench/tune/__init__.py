"""``python -m bench.tune``: the parts of the fused loss on a GPU, each beside what the hardware allows."""
