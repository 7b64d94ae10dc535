"""What capturing costs SGLang: ``python -m bench.cases.teacher_sglang``, in an environment with SGLang.

One engine answers three kinds of request in turn: bare prefill, prefill whose rows kdflow's plugin writes into a ring,
and SGLang's own ``return_hidden_states``. Turns interleave whatever the machine does meanwhile. After that, a thousand
small batches are captured, and the memory of the engine's processes is taken before and after.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdflow.config import TeacherConfig
from kdflow.teacher import TEACHERS
from kdflow.transport import HiddenRing
from kdflow.types import Microbatch

VOCAB_SIZE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cases.teacher_sglang", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--batch", type=int, default=16, help="prompts")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-batches", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), options.hidden, options.layers, options.length)
        config = TeacherConfig(
            folder,
            backend="sglang",
            device=options.device,
            engine_args={
                "max_total_tokens": 2 * options.batch * (options.length + 8),
                "chunked_prefill_size": -1,
                "max_prefill_tokens": options.batch * options.length,
            },
        )
        teacher: Any = TEACHERS.get("sglang")(config, gpu=0)
        try:
            print(json.dumps(vars(options) | cost(teacher, options) | memory(teacher, options.memory_batches)))
        finally:
            teacher.close()


def make_model(folder: Path, hidden_size: int, num_layers: int, length: int) -> None:
    """A Llama of random weights: its time is that of a real one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 256,
        max_position_embeddings=length + 8,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


class Captured:
    """Batches of equal prompts through the plugin into a ring, where a student takes and drops them."""

    def __init__(self, teacher: Any, batch: int, length: int) -> None:
        self._teacher = teacher
        rows = np.setdiff1d(np.arange(batch * length), np.arange(1, batch + 1) * length - 1).astype(np.int32)
        ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, batch * length).astype(np.int32)
        self.samples = np.split(ids, batch)
        self._microbatch = Microbatch(ids, (length,) * batch, rows)
        self._ring = HiddenRing.create(
            name="bench", num_slots=2, slot_bytes=len(rows) * teacher.hidden_size * teacher.dtype.itemsize
        )
        self._consumer = HiddenRing.attach(self._ring.handle, role="consumer")
        self._ticket = 0

    def __call__(self) -> None:
        errand = self._teacher._errand(self._ring.handle, "host", self._ticket)
        self._teacher._run(self._teacher._prefill(self._microbatch, errand))
        self._consumer.receive(self._ticket).release()
        self._ticket += 1

    def close(self) -> None:
        self._consumer.close()
        self._ring.close()


def cost(teacher: Any, options: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each kind, and how much more than bare prefill they are."""
    captured = Captured(teacher, options.batch, options.length)
    prompts = [sample[:-1].tolist() for sample in captured.samples]  # no kind computes the last token

    def generate(num_new: int, **more: Any) -> Callable[[], None]:
        params = {"max_new_tokens": num_new, "temperature": 0.0}
        return lambda: teacher._run(teacher._engine.async_generate(input_ids=prompts, sampling_params=params, **more))

    # SGLang's own way returns nothing where no token is generated.
    kinds = {"bare": generate(0), "captured": captured, "stock": generate(1, return_hidden_states=True)}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(options.rounds + 1):  # the first warms up
        for kind, run in kinds.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[kind].append(time.perf_counter() - start)
            print(f"{turn}: {kind} {time.perf_counter() - start:.2f} s", file=sys.stderr)
    captured.close()
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    over = {f"{kind}_over_bare": medians[kind] / medians["bare"] - 1 for kind in ("captured", "stock")}
    return {f"{kind}_s": value for kind, value in medians.items()} | over


def memory(teacher: Any, num_batches: int) -> dict[str, float]:
    """MiB of this process and the engine's, after a tenth of the batches and after all."""
    captured, found = Captured(teacher, 4, 8), {}
    for number in range(num_batches):
        captured()
        if number + 1 in (num_batches // 10, num_batches):
            found[f"mib_after_{number + 1}"] = tree_mib()
    captured.close()
    return found


def tree_mib() -> float:
    """Anonymous memory of this process and its children."""
    import psutil

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum((p.memory_info().rss - p.memory_info().shared) / 2**20 for p in processes)


if __name__ == "__main__":
    main()
