"""The teacher on plain transformers: no engine needed, any model, CPU or GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from kdflow.config import TeacherConfig
from kdflow.errors import ConfigError
from kdflow.modeling import forward_hidden_states, load_causal_lm, resolve_device, resolve_dtype, to_device
from kdflow.modeling.attention import PACKED_ATTENTION
from kdflow.teacher.base import TEACHERS, LocalTeacher, TeacherRings
from kdflow.types import Microbatch


@TEACHERS.register("hf")
class HFTeacher(LocalTeacher):
    """Runs the decoder, not the head, over packed samples. The head is there for `token_logprobs` alone."""

    @staticmethod
    def check(config: TeacherConfig, *, sleeps: bool = False) -> None:
        if config.tp_size > 1 or config.engine_args:
            raise ConfigError("teacher.tp_size and teacher.engine_args: backend hf has none; use backend sglang")

    def __init__(self, config: TeacherConfig, *, gpu: int, sleeps: bool = False) -> None:
        super().__init__()
        self.check(config, sleeps=sleeps)
        self.device = resolve_device(config.device, gpu)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._model: Any = load_causal_lm(config.model, self.dtype).to(self.device)
        self._decoder = self._model.base_model
        self.hidden_size: int = self._decoder.config.get_text_config().hidden_size

    @torch.inference_mode()
    def prefill(self, microbatch: Microbatch, out: torch.Tensor) -> None:
        hidden = forward_hidden_states(
            self._decoder,
            to_device(microbatch.input_ids, self.device).long(),
            to_device(microbatch.position_ids(), self.device),
            microbatch.sequence_lengths,
        )
        rows = to_device(microbatch.loss_rows, self.device).long()
        if out.device == self.device:
            torch.index_select(hidden, 0, rows, out=out)
        else:
            out.copy_(hidden.index_select(0, rows))
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    @torch.inference_mode()
    def token_logprobs(self, samples: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """One sample at a time, by transformers' own attention."""
        found = []
        self._model.set_attn_implementation("eager")
        try:
            for sample in samples:
                ids = to_device(sample.astype(np.int64), self.device)
                logits = self._model(ids[None], use_cache=False).logits[0, :-1]
                found.append(logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0].cpu())
        finally:
            self._model.set_attn_implementation(PACKED_ATTENTION)
        return found

    def sleep(self) -> None:
        self._decoder.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake_up(self) -> None:
        self._decoder.to(self.device)

    def attach(self, rings: TeacherRings) -> None:
        self._model = None  # with it the head, where it is not tied to the embeddings
        super().attach(rings)
