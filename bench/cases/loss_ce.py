"""What the cross-entropy case of ``bench loss`` runs: the fused loss without a teacher.

Mean cross-entropy with hard labels, forward and backward: 6NVHs flops in three GEMMs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from bench.cases.loss_providers import LOGIT_STD, Params, compile_afresh, compiled_before, loss_trial, normals
from bench.model import Trial, UnavailableError


@dataclass
class CrossEntropyInputs:
    student_input: torch.Tensor  # (N, Hs)
    student_weight: torch.Tensor  # (V, Hs)
    labels: torch.Tensor  # (N,) int64, none ignored

    @classmethod
    def make(cls, params: Params) -> CrossEntropyInputs:
        rows, vocab, hidden = params["num_rows"], params["vocab_size"], params["student_hidden"]
        normal = normals(params)
        generator = torch.Generator().manual_seed(0)
        return cls(
            normal(rows, hidden, 1.0).requires_grad_(),
            normal(vocab, hidden, LOGIT_STD * hidden**-0.5).requires_grad_(),
            torch.randint(vocab, (rows,), generator=generator).to(params["device"]),
        )

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        return self.student_input, self.student_weight


def kdflow(params: Params) -> Trial:
    from kdflow_kernels import fused_kd_loss

    def loss_of(inputs: CrossEntropyInputs) -> torch.Tensor:
        return fused_kd_loss(
            inputs.student_input,
            inputs.student_weight,
            None,
            None,
            inputs.labels,
            kd_weight=0.0,
            ce_weight=1.0,
            backend=params["backend"],
        ).loss

    return loss_trial(CrossEntropyInputs.make(params), loss_of)


def full_logit_loss(student_input: torch.Tensor, student_weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """As one writes it first: full logits, fp32 log-softmax."""
    return F.cross_entropy((student_input @ student_weight.T).float(), labels)


def eager(params: Params) -> Trial:
    return loss_trial(
        CrossEntropyInputs.make(params),
        lambda inputs: full_logit_loss(inputs.student_input, inputs.student_weight, inputs.labels),
    )


def compiled(params: Params) -> Trial:
    function = compile_afresh(full_logit_loss)
    trial = loss_trial(
        CrossEntropyInputs.make(params),
        lambda inputs: function(inputs.student_input, inputs.student_weight, inputs.labels),
    )
    return compiled_before(trial)


def liger(params: Params) -> Trial:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if params["device"] == "cpu":
        raise UnavailableError("a Triton kernel, which needs a GPU")
    loss = LigerFusedLinearCrossEntropyLoss()
    return loss_trial(
        CrossEntropyInputs.make(params),
        lambda inputs: loss(inputs.student_weight, inputs.student_input, inputs.labels),
    )


def cce(params: Params) -> Trial:
    """As it comes: its kernel leaves out of the gradients the blocks where all are below a threshold."""
    return _cce(params, filter_eps="high")


def cce_exact(params: Params) -> Trial:
    return _cce(params, filter_eps=None)


def _cce(params: Params, *, filter_eps: str | None) -> Trial:
    from cut_cross_entropy import linear_cross_entropy

    on_cpu = params["device"] == "cpu"
    trial = loss_trial(
        CrossEntropyInputs.make(params),
        lambda inputs: linear_cross_entropy(
            inputs.student_input,
            inputs.student_weight,
            inputs.labels,
            filter_eps=filter_eps,
            impl="torch_compile" if on_cpu else "cce",
        ),
        note="its torch_compile, in place of its GPU kernel" if on_cpu else "",
    )
    return compiled_before(trial)
