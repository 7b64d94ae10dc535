"""What ``bench loss`` runs in the workers. Every loss is the mean over rows of the divergence at
temperature 1 without hard labels, so all rows of a case do the same job; ``check`` shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F

from bench.model import Trial

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# TRL's and Liger's convention: 0 is KL(teacher || student), 1 the reverse, between them JSD.
BETAS = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
LOGIT_STD = 2.0  # about what language models have; the time does not depend on it

Params = Mapping[str, Any]


class HasStudent(Protocol):
    """Inputs of a loss; those of the student require gradients."""

    student_input: torch.Tensor  # (N, Hs)
    student_weight: torch.Tensor  # (V, Hs)


AnyInputs = TypeVar("AnyInputs", bound=HasStudent)


@dataclass
class Inputs:
    """Hidden states and heads of both sides."""

    student_input: torch.Tensor  # (N, Hs)
    student_weight: torch.Tensor  # (V, Hs)
    teacher_input: torch.Tensor  # (N, Ht)
    teacher_weight: torch.Tensor  # (V, Ht)

    @classmethod
    def make(cls, params: Params) -> Inputs:
        """Normal hidden states and heads scaled to logits of a usual spread, same for a seed."""
        normal = normals(params)
        rows, vocab = params["num_rows"], params["vocab_size"]
        student, teacher = params["student_hidden"], params["teacher_hidden"]
        return cls(
            normal(rows, student, 1.0).requires_grad_(),
            normal(vocab, student, LOGIT_STD * student**-0.5).requires_grad_(),
            normal(rows, teacher, 1.0),
            normal(vocab, teacher, LOGIT_STD * teacher**-0.5),
        )

    @property
    def operands(self) -> tuple[torch.Tensor, ...]:
        return self.student_input, self.student_weight, self.teacher_input, self.teacher_weight


def normals(params: Params) -> Callable[[int, int, float], torch.Tensor]:
    """Draws (rows, columns) of a standard deviation; the same values for a seed."""
    generator = torch.Generator(params["device"]).manual_seed(0)

    def normal(rows: int, columns: int, std: float) -> torch.Tensor:
        # Drawn in fp32 on every device and for every dtype: the same values but for rounding.
        values = torch.randn(rows, columns, generator=generator, device=params["device"])
        return values.mul_(std).to(DTYPES[params["dtype"]])

    return normal


def loss_trial(inputs: AnyInputs, loss_of: Callable[[AnyInputs], torch.Tensor], *, note: str = "") -> Trial:
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


def kdflow_clusters(params: Params) -> Trial:
    """The same with rows in the shared memory of a cluster; the processes of providers are their own."""
    from kdflow_kernels import cluster_rows, triton_backend

    why = cluster_rows.unavailable(torch.device(params["device"]))
    if why is not None:
        raise RuntimeError(f"rows in clusters: {why}")
    triton_backend.CLUSTER_ROWS = True
    return kdflow(params)


def kdflow_forward_kl(params: Params) -> Trial:
    return kdflow({**params, "divergence": "forward_kl"})


def kdflow_jsd(params: Params) -> Trial:
    return kdflow({**params, "divergence": "jsd"})


def clusters_forward_kl(params: Params) -> Trial:
    return kdflow_clusters({**params, "divergence": "forward_kl"})


def clusters_jsd(params: Params) -> Trial:
    return kdflow_clusters({**params, "divergence": "jsd"})


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
    function = compile_afresh(full_logit_loss)
    return compiled_before(loss_trial(Inputs.make(params), _full_logit(function, params)))


def compile_afresh(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """For this case's shapes alone: after eight others, in a process that goes on, dynamo would run it eagerly."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def compiled_before(trial: Trial) -> Trial:
    """After a first step, whose compilation is no part of any repetition."""
    trial.step()
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


def _full_logit(function: Callable[..., torch.Tensor], params: Params) -> Callable[[Inputs], torch.Tensor]:
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
