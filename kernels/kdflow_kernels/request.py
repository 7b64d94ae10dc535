"""From what the public function is given to the problem a backend sees, and from its rows to the output.

Shape suffixes: N rows, Vs and Vt vocabularies of student and teacher, Hs and Ht hidden sizes, K compared tokens.
"""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from kdflow_kernels import validation
from kdflow_kernels.divergences import Divergence
from kdflow_kernels.problem import Head, Problem, RowTerms
from kdflow_kernels.vocab_parallel import VocabParallel


class KDLossOutput(NamedTuple):
    """Result of ``fused_kd_loss``. Only ``loss`` is differentiable; the rest is detached and on the inputs' device.

    With reduction "none" the first three are (N,), zero in ignored rows; everything else is a 0-d tensor.
    """

    loss: Tensor  # kd_weight * kd_loss + ce_weight * ce_loss
    kd_loss: Tensor  # nats; 0 without a teacher
    ce_loss: Tensor  # nats; 0 without labels
    student_entropy: Tensor  # nats, mean over the rows not ignored of H(q), q as the divergence sees it
    teacher_entropy: Tensor  # nats, the same of H(p); NaN without a teacher
    top1_agreement: Tensor  # share of the rows not ignored where argmax p = argmax q; NaN without a teacher
    num_tokens: Tensor  # int64, rows not ignored


class Tensors(NamedTuple):
    """The arguments of ``fused_kd_loss`` that may be tensors."""

    student_input: Tensor  # (N, Hs)
    student_weight: Tensor  # (Vs, Hs)
    student_bias: Tensor | None  # (Vs,)
    teacher_input: Tensor | None  # (N, Ht)
    teacher_weight: Tensor | None  # (Vt, Ht)
    teacher_bias: Tensor | None  # (Vt,)
    shift_labels: Tensor | None  # (N,)
    row_weight: Tensor | None  # (N,)
    student_token_ids: Tensor | None  # (K,)
    teacher_token_ids: Tensor | None  # (K,)
    num_items: int | float | Tensor | None


class Options(NamedTuple):
    """Its other arguments."""

    divergence: str | Divergence
    temperature: float
    kd_weight: float
    ce_weight: float
    ignore_index: int
    reduction: str
    student_logit_scale: float
    teacher_logit_scale: float
    student_softcap: float | None
    teacher_softcap: float | None
    vocab_size: int | None
    chunk_size: int | None
    grad_filter_eps: float
    backend: str
    vocab_parallel: VocabParallel | None


@dataclasses.dataclass(frozen=True)
class Request:
    """A validated request: its problem, and how the problem's rows become the output."""

    problem: Problem
    per_row: bool
    num_rows: int  # N
    num_tokens: Tensor  # 0-d, the rows not ignored
    counted: Tensor | None  # (N,) bool, the rows not ignored; None: all of the problem's rows
    kept_rows: Tensor | None  # (kept,) numbers of the problem's rows, where ignored ones were cut out

    def spread(self, rows: Tensor) -> Tensor:
        """Rows of the problem (kept, ...) among all rows (N, ...), zero in those cut out."""
        if self.kept_rows is None:
            return rows
        return rows.new_zeros((self.num_rows, *rows.shape[1:])).index_put((self.kept_rows,), rows)

    def output(self, loss: Tensor, terms: RowTerms) -> KDLossOutput:
        """loss is the problem's: 0-d, or one a row."""
        scale = self.problem.row_scale

        def reduce(rows: Tensor | None) -> Tensor:
            if rows is None:
                return scale.new_zeros(self.num_rows if self.per_row else ())
            scaled = rows.detach() * scale
            return self.spread(scaled) if self.per_row else scaled.sum()

        def mean(rows: Tensor | None) -> Tensor:
            if rows is None:
                return scale.new_full((), float("nan"))
            total = (rows if self.counted is None else rows * self.counted).sum()
            return total.detach() / self.num_tokens.clamp(min=1)

        return KDLossOutput(
            loss=self.spread(loss) if self.per_row else loss,
            kd_loss=reduce(terms.kd),
            ce_loss=reduce(terms.ce),
            student_entropy=mean(terms.student_entropy),
            teacher_entropy=mean(terms.teacher_entropy),
            top1_agreement=mean(terms.top1_agreement),
            num_tokens=self.num_tokens,
        )


def prepare(tensors: Tensors, options: Options) -> Request:
    """Checks everything and reduces it to the rows that count. Raises ValueError and TypeError; see ``validation``."""
    numbers = (*validation.REALS, *validation.INTEGERS)
    options = options._replace(**{name: validation.check_number(name, getattr(options, name)) for name in numbers})
    validation.check_names(options.reduction, options.backend)
    # Those of the student that gradients flow to wait until autograd has seen them.
    constants = {name: value for name, value in tensors._asdict().items() if name not in Tensors._fields[:3]}
    tensors = tensors._replace(
        **{name: validation.arrived(value) for name, value in constants.items() if isinstance(value, Tensor)}
    )
    student = Head(
        tensors.student_input,
        tensors.student_weight,
        tensors.student_bias,
        options.student_logit_scale,
        options.student_softcap,
        tensors.student_token_ids,
    )
    teacher = None
    if tensors.teacher_input is not None and tensors.teacher_weight is not None:
        teacher = Head(
            tensors.teacher_input,
            tensors.teacher_weight,
            tensors.teacher_bias,
            options.teacher_logit_scale,
            options.teacher_softcap,
            tensors.teacher_token_ids,
        )
    divergence = validation.check_divergence(options.divergence)
    num_compared, num_labels = validation.check_heads(
        student,
        teacher,
        tensors.teacher_input,
        tensors.teacher_weight,
        options.kd_weight,
        options.vocab_size,
        divergence,
        options.vocab_parallel,
    )
    labels, row_weight, num_items = tensors.shift_labels, tensors.row_weight, tensors.num_items
    validation.check_rows(student, labels, row_weight, options.ignore_index, options.ce_weight, num_labels)
    validation.check_num_items(num_items, options.reduction)

    device, num_rows = student.input.device, student.input.shape[0]
    keep = None if labels is None else labels != options.ignore_index
    accumulate = torch.promote_types(student.input.dtype, torch.float32)
    num_tokens = torch.full((), num_rows, device=device) if keep is None else keep.sum()
    scale = torch.ones(num_rows, device=device, dtype=accumulate)
    if row_weight is not None:
        scale = row_weight.to(accumulate)
    if isinstance(num_items, Tensor):
        num_items = num_items.reshape(())  # with dimensions it would have a say in the loss's dtype and shape
    if options.reduction == "mean":
        scale = scale / (num_tokens.clamp(min=1) if num_items is None else num_items)

    kept_rows = None
    if keep is not None and labels is not None:
        if device.type == "cpu":
            if int(num_tokens) < num_rows:
                kept_rows = keep.nonzero().squeeze(-1)
                labels, scale = labels[kept_rows], scale[kept_rows]
                student = dataclasses.replace(student, input=student.input.index_select(0, kept_rows))
                if teacher is not None:
                    teacher = dataclasses.replace(teacher, input=teacher.input.index_select(0, kept_rows))
        else:
            # Cutting rows out would make the host wait for their number: blank them instead, so that whatever they
            # hold meets only zeros.
            labels, scale = labels.masked_fill(~keep, 0), scale.masked_fill(~keep, 0.0)
            student = dataclasses.replace(student, input=student.input.masked_fill(~keep[:, None], 0.0))
            if teacher is not None:
                teacher = dataclasses.replace(teacher, input=teacher.input.masked_fill(~keep[:, None], 0.0))

    problem = Problem(
        student=student,
        teacher=teacher,
        labels=labels,
        row_scale=scale,
        num_compared=num_compared,
        divergence=divergence,
        temperature=options.temperature,
        kd_weight=options.kd_weight,
        ce_weight=options.ce_weight,
        chunk_size=options.chunk_size,
        grad_filter_eps=options.grad_filter_eps,
        vocab_parallel=options.vocab_parallel,
    )
    return Request(
        problem=problem,
        per_row=options.reduction == "none",
        num_rows=num_rows,
        num_tokens=num_tokens,
        counted=None if keep is None or kept_rows is not None else keep,
        kept_rows=kept_rows,
    )
