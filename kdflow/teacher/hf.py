"""The teacher on plain transformers: no engine needed, any model, CPU or GPU."""

from __future__ import annotations

import torch

from kdflow.config import TeacherConfig
from kdflow.modeling import forward_hidden_states, load_decoder, resolve_device, resolve_dtype, to_device
from kdflow.teacher.base import TEACHERS
from kdflow.types import Microbatch


@TEACHERS.register("hf")
class HFTeacher:
    """Runs the decoder, not the head, over packed samples."""

    def __init__(self, config: TeacherConfig, *, gpu: int) -> None:
        self.device = resolve_device(config.device, gpu)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self._decoder = load_decoder(config.model, self.dtype).to(self.device)
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
