"""The fused KD loss: its public function and module.

Shape suffixes: N rows, Vs and Vt vocabularies of student and teacher, Hs and Ht hidden sizes, K compared tokens.
"""

from typing import cast

import torch
from torch import Tensor, nn

from kdflow_kernels import reference, validation
from kdflow_kernels.chunked_loss import choose_backend, chunked_loss, row_loss
from kdflow_kernels.compiled_loss import compiled_loss, is_traced
from kdflow_kernels.divergences import Divergence
from kdflow_kernels.request import KDLossOutput, Options, Tensors, prepare
from kdflow_kernels.vocab_parallel import VocabParallel


def fused_kd_loss(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    shift_labels: Tensor | None = None,
    *,
    divergence: str | Divergence = "forward_kl",
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | float | Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    vocab_size: int | None = None,
    student_token_ids: Tensor | None = None,
    teacher_token_ids: Tensor | None = None,
    chunk_size: int | None = None,
    grad_filter_eps: float = 0.0,
    backend: str = "auto",
    vocab_parallel: VocabParallel | None = None,
) -> KDLossOutput:
    """Distillation loss plus cross-entropy from hidden states, without ever holding (N, V) logits.

    Logits are ``softcap(logit_scale * (input @ weight.T + bias))``, ``softcap(z) = c * tanh(z / c)``. With p and q the
    softmax of the teacher's and the student's logits divided by ``temperature`` over the compared tokens::

        kd_n = divergence(p_n, q_n)                                  # no temperature ** 2 factor
        ce_n = cross_entropy(student logits_n, shift_labels_n)       # temperature 1, the student's whole head
        loss = sum_n row_weight_n * (kd_weight * kd_n + ce_weight * ce_n) / denominator

    over the rows not ignored. Gradients flow to student_input, student_weight and student_bias; the teacher's side is a
    constant. Call it inside the root module's forward under FSDP2, where the head's weight is a plain tensor.

    Args:
        student_input: (N, Hs) last hidden states at the positions that predict; bf16, fp16, fp32 or fp64.
        student_weight: (Vs, Hs) output head, of student_input's dtype (under autocast both are cast as linear would, which leaves fp64 alone).
        teacher_input: (N, Ht) or None: cross-entropy alone, kd_weight must be 0 then.
        teacher_weight: (Vt, Ht) or None; the teacher's dtype may differ from the student's.
        shift_labels: (N,) int64, already shifted. Rows equal to ignore_index enter nothing. None: every row counts.
        divergence: a registered name (``list_divergences()``) or an instance such as ``JSD(beta=0.3)``.
        temperature: divides both logits in the KD term.
        kd_weight, ce_weight: weights of the two terms.
        row_weight: (N,) float, weight of each row in both terms; a constant.
        ignore_index: the label of rows to leave out.
        reduction: "mean" (denominator: num_items, else the number of rows not ignored; not the weights' sum), "sum"
            (denominator 1) or "none" (the rows' losses; gradients are then formed in backward).
        num_items: denominator of "mean", such as the step's loss tokens over all ranks and microbatches.
        student_bias, teacher_bias: (Vs,), (Vt,).
        student_logit_scale, teacher_logit_scale, student_softcap, teacher_softcap: see the formula.
        vocab_size: compare the first vocab_size tokens of both heads; the rest (padding) has no mass in the KD term.
        student_token_ids, teacher_token_ids: (K,) int64, distinct: compare these pairs of tokens only.
        chunk_size: rows whose teacher logits are held at once; None chooses. Bounds the memory, not the result.
        grad_filter_eps: above 0, columns of the vocabulary where no row of a chunk has |d row loss / d logit| above it
            are left out of the gradient's matrix products, but for a rank-1 term in student_input's. Approximate.
        backend: "triton" (CUDA), "torch" (anywhere), "reference" (full logits), or "auto": Triton on CUDA, else torch.
        vocab_parallel: both heads are cut by tokens over the ranks of a group: see ``VocabParallel``. student_weight,
            teacher_weight and the biases are this rank's part; shift_labels and vocab_size are those of the whole
            heads. Every rank gets the same output, student_weight's gradient is that of its part, and student_input's
            is whole unless left partial.

    Returns:
        KDLossOutput. The loss is fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError, TypeError: inputs that do not fit, each naming the argument and the remedy. Ids and labels are
            checked by value on CPU; on CUDA, where that would make the host wait, after
            ``kdflow_kernels.validation.check_values_on_cuda(True)``.

    Inside ``torch.compile``, with fullgraph=True as well, it is one operator; see ``compiled_loss``.

    Sources: each divergence names its own; forming gradients in the forward follows Liger-Kernel (arXiv 2410.10989).
    """
    tensors = Tensors(
        student_input,
        student_weight,
        student_bias,
        teacher_input,
        teacher_weight,
        teacher_bias,
        shift_labels,
        row_weight,
        student_token_ids,
        teacher_token_ids,
        num_items,
    )
    options = Options(
        divergence=divergence,
        temperature=temperature,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        student_logit_scale=student_logit_scale,
        teacher_logit_scale=teacher_logit_scale,
        student_softcap=student_softcap,
        teacher_softcap=teacher_softcap,
        vocab_size=vocab_size,
        chunk_size=chunk_size,
        grad_filter_eps=grad_filter_eps,
        backend=backend,
        vocab_parallel=vocab_parallel,
    )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        validation.check_tensors(**tensors._asdict())
    tensors = _cast_like_linear(tensors)
    if backend != "reference" and (compiling or is_traced(tensors)):
        return compiled_loss(tensors, options)

    request = prepare(tensors, options)
    problem = request.problem
    with torch.autocast(student_input.device.type, enabled=False):
        module = choose_backend(backend, problem)
        if module is None:
            terms = reference.row_terms(problem)
            loss = row_loss(problem, terms)
            loss = loss if request.per_row else loss.sum()
        else:
            loss, terms = chunked_loss(problem, module, per_row=request.per_row)
    return request.output(loss, terms)


def _cast_like_linear(tensors: Tensors) -> Tensors:
    """Rows and heads as autocast hands them to linear, where it is on: in its dtype, but for fp64."""
    device_type = tensors.student_input.device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)

    def cast(tensor):
        return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)

    return tensors._replace(
        student_input=cast(tensors.student_input),
        student_weight=cast(tensors.student_weight),
        teacher_input=cast(tensors.teacher_input),
        teacher_weight=cast(tensors.teacher_weight),
    )


class FusedKDLoss(nn.Module):
    """``fused_kd_loss`` with its options fixed; ``forward`` takes the tensors and num_items. Token ids move with the module."""

    def __init__(
        self,
        *,
        divergence: str | Divergence = "forward_kl",
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        ce_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        student_logit_scale: float = 1.0,
        teacher_logit_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        vocab_size: int | None = None,
        student_token_ids: Tensor | None = None,
        teacher_token_ids: Tensor | None = None,
        chunk_size: int | None = None,
        grad_filter_eps: float = 0.0,
        backend: str = "auto",
        vocab_parallel: VocabParallel | None = None,
    ) -> None:
        super().__init__()
        self.divergence = validation.check_divergence(divergence)
        validation.check_names(reduction, backend)
        number = validation.check_number
        self.temperature = number("temperature", temperature)
        self.kd_weight = number("kd_weight", kd_weight)
        self.ce_weight = number("ce_weight", ce_weight)
        self.ignore_index = number("ignore_index", ignore_index)
        self.reduction = reduction
        self.student_logit_scale = number("student_logit_scale", student_logit_scale)
        self.teacher_logit_scale = number("teacher_logit_scale", teacher_logit_scale)
        self.student_softcap = number("student_softcap", student_softcap)
        self.teacher_softcap = number("teacher_softcap", teacher_softcap)
        self.vocab_size = number("vocab_size", vocab_size)
        self.chunk_size = number("chunk_size", chunk_size)
        self.grad_filter_eps = number("grad_filter_eps", grad_filter_eps)
        self.backend = backend
        self.vocab_parallel = vocab_parallel
        self.register_buffer("student_token_ids", student_token_ids, persistent=False)
        self.register_buffer("teacher_token_ids", teacher_token_ids, persistent=False)

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor | None,
        teacher_weight: Tensor | None,
        shift_labels: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        num_items: int | float | Tensor | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> KDLossOutput:
        return fused_kd_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            shift_labels,
            divergence=self.divergence,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            row_weight=row_weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            num_items=num_items,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            student_logit_scale=self.student_logit_scale,
            teacher_logit_scale=self.teacher_logit_scale,
            student_softcap=self.student_softcap,
            teacher_softcap=self.teacher_softcap,
            vocab_size=self.vocab_size,
            student_token_ids=cast("Tensor | None", self.student_token_ids),
            teacher_token_ids=cast("Tensor | None", self.teacher_token_ids),
            chunk_size=self.chunk_size,
            grad_filter_eps=self.grad_filter_eps,
            backend=self.backend,
            vocab_parallel=self.vocab_parallel,
        )

    def extra_repr(self) -> str:
        weights = f"kd_weight={self.kd_weight}, ce_weight={self.ce_weight}"
        return f"{self.divergence}, temperature={self.temperature}, {weights}"
