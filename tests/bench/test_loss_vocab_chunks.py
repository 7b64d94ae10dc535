"""The baseline by chunks of the vocabulary computes the loss that full logits give."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases.loss_providers import BETAS, Inputs, full_logit_loss
from bench.cases.loss_vocab_chunks import vocab_chunked_loss

SIZES = {"num_rows": 9, "vocab_size": 101, "student_hidden": 6, "teacher_hidden": 10, "device": "cpu"}


def inputs(dtype: str) -> Inputs:
    return Inputs.make({**SIZES, "dtype": dtype})


def by_hand(student_input: Tensor, student_weight: Tensor, teacher_input: Tensor, teacher_weight: Tensor, beta: float):
    log_q = (student_input @ student_weight.T).log_softmax(-1)
    log_p = (teacher_input @ teacher_weight.T).log_softmax(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)

    if beta in (0.0, 1.0):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = (beta * log_p.exp() + (1.0 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1.0 - beta) * kl(log_q, log_m)


@pytest.mark.parametrize("divergence", BETAS)
@pytest.mark.parametrize("chunk_columns", [1, 32, 101, 4096])
def test_equals_full_logits(divergence: str, chunk_columns: int) -> None:
    h, w, ht, wt = (tensor.detach().double() for tensor in astuple(inputs("fp32")))
    student = [h.requires_grad_(), w.requires_grad_()]
    expected = by_hand(h, w, ht, wt, BETAS[divergence])
    found = vocab_chunked_loss(h, w, ht, wt, BETAS[divergence], chunk_columns)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
    gradients = (torch.autograd.grad(2.0 * loss, student) for loss in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)


def test_in_bf16_it_is_as_near_as_full_logits() -> None:
    h, w, ht, wt = (tensor.detach() for tensor in astuple(inputs("bf16")))
    exact = by_hand(h.double(), w.double(), ht.double(), wt.double(), 0.5)
    eager_error = (full_logit_loss(h, w, ht, wt, 0.5) - exact).abs()
    assert (vocab_chunked_loss(h, w, ht, wt, 0.5, 32) - exact).abs() <= 1.5 * eager_error + 1e-6 * exact
