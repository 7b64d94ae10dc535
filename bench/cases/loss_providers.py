"""What ``bench loss`` runs in the workers. Every loss is the mean over rows of the divergence at
temperature 1 without hard labels, so all rows of a case do the same job; ``check`` shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from bench.model import Trial

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# TRL's and Liger's convention: 0 is KL(teacher || student), 1 the reverse, between them JSD.
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
LOGIT_STD = 2.0  # about what language models have; the time does not depend on it

Params = Mapping[str, Any]
Loss = Callable[["Inputs"], torch.Tensor]


@dataclass
class Inputs:
    """Hidden states and heads of both sides; the student's require gradients."""

    student_input: torch.Tensor  # (N, Hs)
    student_weight: torch.Tensor  # (V, Hs)
    teacher_input: torch.Tensor  # (N, Ht)
    teacher_weight: torch.Tensor  # (V, Ht)

    @classmethod
    def make(cls, params: Params) -> Inputs:
        """Normal hidden states and heads scaled to logits of a usual spread, same for a seed."""
        device = params["device"]
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, columns: int, std: float) -> torch.Tensor:
            # Drawn in fp32 on every device and for every dtype: the same values but for rounding.
            values = torch.randn(rows, columns, generator=generator, device=device)
            return values.mul_(std).to(DTYPES[params["dtype"]])

        rows, vocab = params["num_rows"], params["vocab_size"]
        student, teacher = params["student_hidden"], params["teacher_hidden"]
        return cls(
            normal(rows, student, 1.0).requires_grad_(),
            normal(vocab, student, LOGIT_STD * student**-0.5).requires_grad_(),
            normal(rows, teacher, 1.0),
            normal(vocab, teacher, LOGIT_STD * teacher**-0.5),
        )


def loss_trial(inputs: Inputs, loss_of: Loss, *, note: str = "") -> Trial:
    """A trial whose step is forward and backward of ``loss_of``."""
    student = (inputs.student_input, inputs.student_weight)
    last: dict[str, torch.Tensor] = {}

    def step() -> None:
        loss = loss_of(inputs)
        loss.backward()
        last["loss"] = loss.detach()

    def drop_gradients() -> None:
        for tensor in student:
            tensor.grad = None

    def check() -> dict[str, float]:
        return {
            "loss": last["loss"].item(),
            "norm_dH": _norm(inputs.student_input.grad),
            "norm_dW": _norm(inputs.student_weight.grad),
        }

    return Trial(
        step,
        check=check,
        prepare=drop_gradients,
        gradient_bytes=sum(tensor.numel() * tensor.element_size() for tensor in student),
        note=note,
        on_stream=True,
    )


def _norm(gradient: torch.Tensor | None) -> float:
    assert gradient is not None
    return torch.linalg.vector_norm(gradient, dtype=torch.float32).item()


def kdflow(params: Params) -> Trial:
    from kdflow_kernels import fused_kd_loss

    def loss_of(inputs: Inputs) -> torch.Tensor:
        return fused_kd_loss(
            inputs.student_input,
            inputs.student_weight,
            inputs.teacher_input,
            inputs.teacher_weight,
            divergence=params["divergence"],
            backend=params["backend"],
        ).loss

    return loss_trial(Inputs.make(params), loss_of)


def full_logit_loss(
    student_input: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_input: torch.Tensor,
    teacher_weight: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """The loss as one writes it first: both full logits, fp32 log-softmax, ``kl_div``."""
    log_q = F.log_softmax((student_input @ student_weight.T).float(), dim=-1)
    with torch.no_grad():
        log_p = F.log_softmax((teacher_input @ teacher_weight.T).float(), dim=-1)
    if beta == 0.0:
        return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if beta == 1.0:
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    log_m = torch.logaddexp(log_p + torch.tensor(beta).log(), log_q + torch.tensor(1.0 - beta).log())
    from_teacher = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
    from_student = F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
    return beta * from_teacher + (1.0 - beta) * from_student


def eager(params: Params) -> Trial:
    return loss_trial(Inputs.make(params), _full_logit(full_logit_loss, params))


def compiled(params: Params) -> Trial:
    function = torch.compile(full_logit_loss, dynamic=False)
    trial = loss_trial(Inputs.make(params), _full_logit(function, params))
    trial.step()  # compiles, which is no part of any repetition
    if trial.prepare is not None:
        trial.prepare()
    return trial


def row_chunks(params: Params) -> Trial:
    """How one bounds the memory in plain torch: the full-logit loss on 1024 rows at a time, each
    piece computed again in backward; what frameworks without a kernel of their own do."""
    from torch.utils.checkpoint import checkpoint

    beta = BETAS[params["divergence"]]
    size = min(1024, params["num_rows"])

    def loss_of(inputs: Inputs) -> torch.Tensor:
        total = inputs.student_input.new_zeros((), dtype=torch.float32)
        pieces = zip(inputs.student_input.split(size), inputs.teacher_input.split(size), strict=True)
        for student_rows, teacher_rows in pieces:
            loss = checkpoint(
                full_logit_loss,
                student_rows,
                inputs.student_weight,
                teacher_rows,
                inputs.teacher_weight,
                beta,
                use_reentrant=False,
            )
            assert isinstance(loss, torch.Tensor)
            total = total + loss * len(student_rows)
        return total / params["num_rows"]

    return loss_trial(Inputs.make(params), loss_of)


def _full_logit(function: Callable[..., torch.Tensor], params: Params) -> Loss:
    beta = BETAS[params["divergence"]]

    def loss_of(inputs: Inputs) -> torch.Tensor:
        return function(
            inputs.student_input,
            inputs.student_weight,
            inputs.teacher_input,
            inputs.teacher_weight,
            beta,
        )

    return loss_of


def liger(params: Params) -> Trial:
    return _liger(params, chunk_size=1024)  # its default


def liger_small_chunks(params: Params) -> Trial:
    return _liger(params, chunk_size=128)


def _liger(params: Params, *, chunk_size: int) -> Trial:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=BETAS[params["divergence"]],
        compiled=params["device"] != "cpu",
        chunk_size=chunk_size,
    )
    labels = torch.zeros(params["num_rows"], dtype=torch.long, device=params["device"])

    def loss_of(inputs: Inputs) -> torch.Tensor:
        return loss(
            inputs.student_input,
            inputs.student_weight,
            inputs.teacher_input,
            inputs.teacher_weight,
            labels,
        )

    return loss_trial(Inputs.make(params), loss_of)


def liger_fused(params: Params) -> Trial:
    """Liger's Triton kernel between GEMMs by chunks, gradients formed in forward as ours are."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=BETAS[params["divergence"]])

    def loss_of(inputs: Inputs) -> torch.Tensor:
        return loss(inputs.student_input, inputs.student_weight, inputs.teacher_input, inputs.teacher_weight, None)

    return loss_trial(Inputs.make(params), loss_of)


def trl(params: Params) -> Trial:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = BETAS[params["divergence"]]

    def loss_of(inputs: Inputs) -> torch.Tensor:
        divergence, _entropy = ChunkedDivergenceFunction.apply(
            inputs.student_input,
            inputs.student_weight,
            None,
            inputs.teacher_input,
            inputs.teacher_weight,
            None,
            beta,
        )
        return divergence.mean()

    return loss_trial(Inputs.make(params), loss_of)


def gemms(params: Params) -> Trial:
    """Both projections and the two gradient GEMMs in the case's dtype, into buffers made before."""
    return gemm_trial(Inputs.make(params), cast_inside=False)


def upcast_gemms(params: Params) -> Trial:
    """The same in fp32, operands cast up and gradients cast down inside the step."""
    return gemm_trial(Inputs.make(params), cast_inside=True)


def fp32_gemms(params: Params) -> Trial:
    """The same in fp32 on operands cast up before."""
    inputs = Inputs.make(params)
    raised = [tensor.detach().float() for tensor in vars(inputs).values()]
    return gemm_trial(Inputs(*raised), cast_inside=False)


@torch.no_grad()
def gemm_trial(inputs: Inputs, *, cast_inside: bool) -> Trial:
    operands = [tensor.detach() for tensor in vars(inputs).values()]
    dtype = torch.float32 if cast_inside else operands[0].dtype
    raised = [torch.empty_like(tensor, dtype=dtype) for tensor in operands] if cast_inside else []
    rows, vocab = operands[0].shape[0], operands[1].shape[0]
    student_logits = operands[0].new_zeros(rows, vocab, dtype=dtype)
    teacher_logits = torch.zeros_like(student_logits)
    grad_input = torch.zeros_like(operands[0], dtype=dtype)
    grad_weight = torch.zeros_like(operands[1], dtype=dtype)
    lowered = [torch.empty_like(tensor) for tensor in operands[:2]] if cast_inside else []
    grad_logits = _grad_logits(operands) if student_logits.is_cuda else student_logits

    @torch.no_grad()
    def step() -> None:
        for target, source in zip(raised, operands, strict=False):
            target.copy_(source)
        student_input, student_weight, teacher_input, teacher_weight = raised or operands
        torch.mm(student_input, student_weight.T, out=student_logits)
        torch.mm(teacher_input, teacher_weight.T, out=teacher_logits)
        torch.mm(grad_logits, student_weight, out=grad_input)
        torch.mm(grad_logits.T, student_input, out=grad_weight)
        for target, source in zip(lowered, (grad_input, grad_weight), strict=False):
            target.copy_(source)

    return Trial(step, note=f"{dtype}".removeprefix("torch."), on_stream=True)


def _grad_logits(operands: list[torch.Tensor]) -> torch.Tensor:
    """(N, V) of forward KL, for the GEMMs' time on a GPU: its clocks follow its power, and that
    follows the values. On a CPU the logits stand in for their own gradient."""
    student_input, student_weight, teacher_input, teacher_weight = operands
    pieces = zip(student_input.split(512), teacher_input.split(512), strict=True)
    return torch.cat(
        [
            (F.softmax((s @ student_weight.T).float(), -1) - F.softmax((t @ teacher_weight.T).float(), -1))
            .div_(len(student_input))
            .to(s.dtype)
            for s, t in pieces
        ]
    )
