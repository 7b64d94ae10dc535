"""A plugin of SGLang that plants faults: wrong hidden states, as engines were seen to hand over without a word.

The file that SGLANG_FAULT names holds the fault of the moment; it is read at every forward. `unloadable` is obeyed when
the plugin is loaded: kdflow's own cannot be imported then. `slow` gives time to kill a scheduler between two forwards.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

_seen: set[tuple[int, ...]] = set()
_before_norm: dict[str, torch.Tensor] = {}
_lost_weights: list[torch.Tensor] = []


def fault() -> str:
    path = Path(os.environ["SGLANG_FAULT"])
    return path.read_text() if path.is_file() else ""


def rows_of_another_request(batch: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Requests get one another's rows, as far as they are long enough."""
    lengths = batch.extend_seq_lens.tolist()
    sound = hidden.clone().split(lengths)
    for index, part in enumerate(hidden.split(lengths)):
        other = sound[index - 1]
        part[: len(other)] = other[: len(part)]
    return hidden


def shift_behind_cached_prefix(batch: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Rows of a request that begins as an earlier one are three places off."""
    parts = []
    for ids, part in zip(
        batch.input_ids.split(batch.extend_seq_lens.tolist()),
        hidden.split(batch.extend_seq_lens.tolist()),
        strict=True,
    ):
        beginning = tuple(ids[:8].tolist())
        parts.append(part.roll(3, 0) if beginning in _seen else part)
        _seen.add(beginning)
    return torch.cat(parts)


def before_norm(batch: Any, hidden: torch.Tensor) -> torch.Tensor:
    return _before_norm["rows"]


FAULTS = {f.__name__: f for f in (rows_of_another_request, shift_behind_cached_prefix, before_norm)}


def _lose_or_find_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        if _lost_weights:
            for weight in model.parameters():
                weight.copy_(_lost_weights.pop(0))
        else:
            for weight in model.parameters():
                _lost_weights.append(weight.clone())
                weight.zero_()


def around_forward(forward: Any, runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if not _before_norm:
        # RMSNorm of SGLang adds the residual and returns (normed, sum).
        runner.model.model.norm.register_forward_hook(lambda m, i, out: _before_norm.update(rows=out[1]))
        _before_norm["rows"] = torch.empty(0)
    if (fault() == "no_weights") != bool(_lost_weights):
        _lose_or_find_weights(runner.model)
    if fault() == "slow":
        time.sleep(1.0)
    result = forward(runner, batch, *args, **kwargs)
    output = result.logits_output
    if output.hidden_states is not None and batch.extend_seq_lens is not None and fault() in FAULTS:
        output.hidden_states = FAULTS[fault()](batch, output.hidden_states.clone())
    return result


def register() -> None:
    if "SGLANG_FAULT" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.forward", around_forward, HookType.AROUND)


if os.environ.get("SGLANG_FAULT") and fault() == "unloadable":
    sys.modules["kdflow.teacher.sglang_plugin"] = None  # type: ignore[assignment]
