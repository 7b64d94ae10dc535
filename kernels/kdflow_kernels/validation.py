"""Checks of the public arguments. Each raises one error that says what, got, expected and the remedy."""

import math
import numbers
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdflow_kernels.divergences import Divergence, check_class, get_divergence
from kdflow_kernels.problem import Head
from kdflow_kernels.vocab_parallel import VocabParallel, check_parts

BACKENDS = ("auto", "triton", "torch", "reference")
REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

# What is expected of each number, and whether one fits. Where None is named it is an answer, too.
REALS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "temperature": ("a finite number above 0", lambda value: value > 0),
    "kd_weight": ("a finite number", lambda value: True),
    "ce_weight": ("a finite number", lambda value: True),
    "student_logit_scale": ("a finite number other than 0", lambda value: value != 0),
    "teacher_logit_scale": ("a finite number other than 0", lambda value: value != 0),
    "student_softcap": ("a finite number above 0 or None", lambda value: value > 0),
    "teacher_softcap": ("a finite number above 0 or None", lambda value: value > 0),
    "grad_filter_eps": ("0 (exact) or a small positive number", lambda value: value >= 0),
}
INTEGERS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "ignore_index": ("an integer", lambda value: True),
    "vocab_size": ("a number of tokens of at least 1 or None", lambda value: value >= 1),
    "chunk_size": ("a number of rows of at least 1 or None", lambda value: value >= 1),
}

_check_values_on_cuda = False


def check_values_on_cuda(enabled: bool) -> None:
    """Check ids and labels by value on CUDA too (on CPU they always are). It makes the host wait for the GPU."""
    global _check_values_on_cuda
    _check_values_on_cuda = enabled


def _values_are_checked(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or _check_values_on_cuda


def check_divergence(divergence: str | Divergence) -> Divergence:
    """The instance named or given."""
    if isinstance(divergence, Divergence):
        check_class("divergence", type(divergence))
        return divergence
    if isinstance(divergence, str):
        return get_divergence(divergence)
    raise TypeError(f"divergence: expected a registered name or a Divergence instance, got {divergence!r}")


def check_tensors(*, num_items: float | Tensor | None, **tensors: Tensor | None) -> None:
    """Are these tensors or None, and none of them cut over ranks?"""
    if isinstance(num_items, Tensor):
        tensors["num_items"] = num_items
    for name, tensor in tensors.items():
        if tensor is None and name not in ("student_input", "student_weight"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: expected a torch.Tensor, got {type(tensor).__name__}; convert it with torch.as_tensor"
            )
        if _is_a(tensor, "torch.distributed.tensor", "DTensor"):
            raise TypeError(
                f"{name}: expected a plain tensor, got a DTensor; compute the loss inside the root FSDP module's forward "
                "(or a method registered with register_fsdp_forward_method), where the head is gathered and its gradient "
                "reduced (full_tensor() outside it would lose that reduction), and give it this rank's rows and their "
                "labels and weights as to_local() has them"
            )


def arrived(tensor: Tensor) -> Tensor:
    """The tensor, detached, and in memory of its own: what a collective is still to bring is waited for."""
    tensor = tensor.detach()
    if _is_a(tensor, "torch.distributed._functional_collectives", "AsyncCollectiveTensor"):
        return tensor.wait()  # type: ignore[attr-defined]
    return tensor


def _is_a(tensor: Tensor, module: str, name: str) -> bool:
    """Nobody can hold one without its module having been imported."""
    return module in sys.modules and isinstance(tensor, getattr(sys.modules[module], name))


def check_number(name: str, value: Any) -> Any:
    """The number given for an argument, as a float or an int of Python's."""
    expected, fits = REALS[name] if name in REALS else INTEGERS[name]
    if value is None and expected.endswith("None"):
        return None
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{name}: expected {expected}, got a tensor that requires gradients, and none would reach it; pass its "
            ".item(), and multiply student_input by what is to be learned"
        )
    try:
        number = operator.index(value) if name in INTEGERS else _as_float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: expected {expected}, got {value!r}") from None
    if not (math.isfinite(number) and fits(number)):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def _as_float(value: object) -> float:
    if not isinstance(value, (numbers.Real, Tensor)):  # float() would read a string
        raise TypeError
    return float(value)


def check_names(reduction: str, backend: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: unknown {reduction!r}; known: {', '.join(REDUCTIONS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend: unknown {backend!r}; known: {', '.join(BACKENDS)}")


def check_num_items(num_items: int | float | Tensor | None, reduction: str) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items: only reduction='mean' divides by it, got reduction={reduction!r}; drop it")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one number, got a tensor of shape {tuple(num_items.shape)}")
        if not _values_are_checked(num_items):
            return
    elif not isinstance(num_items, numbers.Real):
        raise TypeError(f"num_items: expected a number above 0 or None, got {num_items!r}")
    if not num_items > 0:
        raise ValueError(
            f"num_items: expected a number above 0, got {num_items}; leave it out to divide by the rows not ignored"
        )


def check_heads(
    student: Head,
    teacher: Head | None,
    teacher_input: Tensor | None,
    teacher_weight: Tensor | None,
    kd_weight: float,
    vocab_size: int | None,
    divergence: Divergence,
    parallel: VocabParallel | None,
) -> tuple[int, int | None]:
    """Check both sides and how their vocabularies meet.

    Returns the number of compared tokens K, of heads cut over ranks those of this rank, and the tokens that a label may
    be; None where the latter would have to be asked of other ranks and make the host wait.
    """
    _check_head("student", student)
    if teacher is None:
        if teacher_input is not None or teacher_weight is not None:
            missing = "teacher_weight" if teacher_weight is None else "teacher_input"
            raise ValueError(f"{missing}: got None with the other given; pass both, or neither for cross-entropy alone")
        if kd_weight != 0.0:
            raise ValueError(
                f"teacher_input: got None with kd_weight={kd_weight}; pass the teacher's hidden states and head, "
                "or kd_weight=0 for cross-entropy alone"
            )
    else:
        _check_head("teacher", teacher)
        if teacher.input.shape[0] != student.input.shape[0]:
            raise ValueError(
                f"teacher_input: expected {student.input.shape[0]} rows (student_input), got {teacher.input.shape[0]}; "
                "both must hold the same positions"
            )
        for name, tensor in (("teacher_input", teacher.input), ("teacher_weight", teacher.weight)):
            _check_device(name, tensor, student.input)
    if parallel is None:
        return _check_vocabularies(student, teacher, vocab_size), student.weight.shape[0]
    return _check_vocab_parallel(parallel, student, teacher, vocab_size, divergence)


def _check_head(side: str, head: Head) -> None:
    named = {f"{side}_input": head.input, f"{side}_weight": head.weight, f"{side}_bias": head.bias}
    for name, tensor in named.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(f"{name}: expected bfloat16, float16, float32 or float64, got {tensor.dtype}")
    hidden, weight = head.input, head.weight
    for name, tensor in ((f"{side}_input", hidden), (f"{side}_weight", weight)):
        if tensor.dim() != 2:
            raise ValueError(
                f"{name}: expected 2 dimensions, got shape {tuple(tensor.shape)}; flatten batch and sequence into rows"
            )
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{side}_input: expected hidden size {weight.shape[1]} ({side}_weight), got {hidden.shape[1]}; "
            "are these the hidden states of the model this head belongs to?"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{side}_weight: expected {hidden.dtype} ({side}_input), got {weight.dtype}; cast one with .to(), "
            "or call inside torch.autocast"
        )
    _check_device(f"{side}_weight", weight, hidden)
    if head.bias is not None:
        if head.bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{side}_bias: expected shape ({weight.shape[0]},) ({side}_weight), got {tuple(head.bias.shape)}"
            )
        _check_device(f"{side}_bias", head.bias, hidden)


def _check_device(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device} (student_input), got {tensor.device}; move it with .to()"
        )


def _check_vocabularies(student: Head, teacher: Head | None, vocab_size: int | None) -> int:
    student_ids, teacher_ids = student.token_ids, None if teacher is None else teacher.token_ids
    num_student = student.weight.shape[0]
    num_teacher = num_student if teacher is None else teacher.weight.shape[0]
    for side, number in (("student", num_student), ("teacher", num_teacher)):
        if number == 0:
            raise ValueError(f"{side}_weight: expected at least one token, got none")
    if student_ids is not None or teacher_ids is not None:
        if vocab_size is not None:
            raise ValueError(
                "vocab_size: cannot be combined with student_token_ids and teacher_token_ids; pass one of them"
            )
        if teacher is not None and (student_ids is None or teacher_ids is None):
            missing = "student_token_ids" if student_ids is None else "teacher_token_ids"
            raise ValueError(f"{missing}: got None with the other given; the ids pair up, pass both")
        for name, ids, limit in (
            ("student_token_ids", student_ids, num_student),
            ("teacher_token_ids", teacher_ids, num_teacher),
        ):
            if ids is not None:
                _check_ids(name, ids, limit, student.input)
        if student_ids is not None and teacher_ids is not None and len(student_ids) != len(teacher_ids):
            raise ValueError(
                f"teacher_token_ids: expected {len(student_ids)} ids (student_token_ids), got {len(teacher_ids)}; "
                "the ids pair up one to one"
            )
        return num_student if student_ids is None else len(student_ids)
    if vocab_size is not None:
        smallest = min(num_student, num_teacher)
        if vocab_size > smallest:
            raise ValueError(
                f"vocab_size: expected 1 to {smallest}, the smaller of the heads ({num_student} student, "
                f"{num_teacher} teacher tokens), got {vocab_size}"
            )
        return vocab_size
    if num_student != num_teacher:
        raise ValueError(
            f"teacher_weight: expected {num_student} tokens (student_weight), got {num_teacher}; pass "
            "vocab_size=<tokens both share> if one head is padded, or student_token_ids and teacher_token_ids if the "
            "tokenizers differ"
        )
    return num_student


def _check_vocab_parallel(
    parallel: VocabParallel,
    student: Head,
    teacher: Head | None,
    vocab_size: int | None,
    divergence: Divergence,
) -> tuple[int, int | None]:
    if not isinstance(parallel, VocabParallel):
        raise TypeError(f"vocab_parallel: expected a VocabParallel or None, got {type(parallel).__name__}")
    if student.token_ids is not None or (teacher is not None and teacher.token_ids is not None):
        raise ValueError(
            "vocab_parallel: cannot be combined with student_token_ids and teacher_token_ids, whose pairs lie in "
            "different ranks; use whole heads, or vocab_size"
        )
    if teacher is not None and not divergence.is_pointwise():
        raise ValueError(
            f"vocab_parallel: divergence {divergence.name!r} needs whole rows, and a rank has its own tokens alone; choose "
            "one that is a sum over the vocabulary, such as forward_kl or jsd, or use whole heads"
        )
    num_student = student.weight.shape[0]
    num_teacher = num_student if teacher is None else teacher.weight.shape[0]
    num_tokens = None
    if _values_are_checked(student.input):
        num_tokens = check_parts(parallel, num_student, num_teacher, vocab_size, student.input.device)
    num_compared = num_student
    if vocab_size is not None:
        num_compared = max(0, min(num_student, vocab_size - parallel.start))
    return num_compared, num_tokens


def _check_ids(name: str, ids: Tensor, limit: int, like: Tensor) -> None:
    if ids.dtype != torch.int64 or ids.dim() != 1 or len(ids) == 0:
        raise TypeError(
            f"{name}: expected int64 of shape (K,), K at least 1, got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    _check_device(name, ids, like)
    if not _values_are_checked(ids):
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= limit:
        raise ValueError(f"{name}: expected ids from 0 to {limit - 1}, got {low if low < 0 else high}")
    if int(ids.bincount().max()) > 1:
        raise ValueError(
            f"{name}: expected distinct ids, got {int(ids.bincount().argmax())} more than once; drop the duplicates"
        )


def check_rows(
    student: Head,
    shift_labels: Tensor | None,
    row_weight: Tensor | None,
    ignore_index: int,
    ce_weight: float,
    num_tokens: int | None,
) -> None:
    """num_tokens: what check_heads returned."""
    num_rows = student.input.shape[0]
    if row_weight is not None:
        if not row_weight.is_floating_point():
            raise TypeError(f"row_weight: expected a floating dtype, got {row_weight.dtype}")
        if row_weight.shape != (num_rows,):
            raise ValueError(f"row_weight: expected shape ({num_rows},) (student_input), got {tuple(row_weight.shape)}")
        _check_device("row_weight", row_weight, student.input)
    if shift_labels is None:
        if ce_weight != 0.0:
            raise ValueError(f"shift_labels: got None with ce_weight={ce_weight}; pass labels, or ce_weight=0")
        return
    if shift_labels.dtype != torch.int64:
        raise TypeError(f"shift_labels: expected int64, got {shift_labels.dtype}; convert with .long()")
    if shift_labels.shape != (num_rows,):
        raise ValueError(
            f"shift_labels: expected shape ({num_rows},) (student_input), got {tuple(shift_labels.shape)}; "
            "flatten them like the rows"
        )
    _check_device("shift_labels", shift_labels, student.input)
    if num_tokens is not None and _values_are_checked(shift_labels):
        wrong = (shift_labels != ignore_index) & ((shift_labels < 0) | (shift_labels >= num_tokens))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"shift_labels: expected 0 to {num_tokens - 1} (student_weight) or ignore_index={ignore_index}, "
                f"got {int(shift_labels[row])} in row {row}"
            )
