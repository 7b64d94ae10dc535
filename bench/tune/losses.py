"""The whole loss with other constants."""

from __future__ import annotations

import itertools

import torch

from bench.tune.measure import Shape, constants, line, say
from bench.tune.rows import KEPT_SHARES
from kdflow_kernels import fused_kd_loss, triton_backend


def whole_loss(s: Shape, name: str, divergence: str = "forward_kl", **changed: object) -> None:
    """The loss with other constants, in turn with the loss as it comes, which counts as 100%."""
    h, w = s.h.clone().requires_grad_(), s.w.clone().requires_grad_()

    def steps() -> None:  # several in a row, as in a training loop, where the host is ahead
        for _ in range(2):
            h.grad = w.grad = None
            fused_kd_loss(h, w, s.ht, s.wt, divergence=divergence).loss.backward()

    def timed() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        steps()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 2

    with line("loss", f"{name} {divergence}"):
        times, ratios = [], []
        for _ in range(9):
            plain = timed()
            with constants(triton_backend, **changed):
                times.append(timed())
            ratios.append(times[-1] / plain)
        h.grad = w.grad = None
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        with constants(triton_backend, **changed):
            steps()
        peak = (torch.cuda.max_memory_allocated() - held - h.nbytes - w.nbytes) / 2**20
        ms, ratio = sorted(times[1:])[4], sorted(ratios[1:])[4]  # the first round warmed up
        say("loss", f"{name} {divergence}", ms, percent_of_plain=100 * ratio, peak_mib=peak)


def time_losses(s: Shape) -> None:
    for divergence in ("forward_kl", "jsd", "reverse_kl"):
        whole_loss(s, "as it comes", divergence)  # how well the ratios below can be known
    for divergence, kept_share in itertools.product(("forward_kl", "jsd"), KEPT_SHARES[1:]):
        whole_loss(s, f"kept share {kept_share}", divergence, KEPT_SHARE=kept_share)
    whole_loss(s, "fp32 logits", _fp32_logits=True)
    whole_loss(s, "fp32 sums of dW", GROUPS_IN_LOW_PRECISION=0)
    whole_loss(s, "rows not staggered", STAGGER=0)
    whole_loss(s, "chunks of 512", CHUNK_ROWS=512)
    for rows in (1664, 2816, 4096):
        whole_loss(s, f"groups of {rows}", plan_groups=lambda *_, rows=rows: rows)
