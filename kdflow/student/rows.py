"""Brings teacher rows to where the student computes."""

from __future__ import annotations

from collections.abc import Callable

import torch

TeacherRows = Callable[[], torch.Tensor]


class RowsToDevice:
    """Teacher rows on the student's device; copied ones are whole when the call returns.

    So their slot may be given back while the device still computes. Receiving and copying have a
    stream of their own: the host waits for them alone, not for the forward that was queued before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, teacher_rows: TeacherRows) -> torch.Tensor:
        if self._stream is None:
            return teacher_rows()
        with torch.cuda.stream(self._stream):
            copied = teacher_rows().to(self._device, copy=True)
        self._stream.synchronize()
        copied.record_stream(torch.cuda.current_stream(self._device))
        return copied
