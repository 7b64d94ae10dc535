# pyright: reportAssignmentType=false, reportArgumentType=false
"""What every kernel over rows of logits does: read a block of both sides as fp32, and keep softmax statistics of it.

Logits are read as stored; exponentials are powers of 2 of logits times `exponent`, which is log2(e) / temperature.

Legend: V columns of the student, K of them compared; a block of columns is (LANES, WIDTH), WIDTH neighbours being what one
thread loads at once. Rows are padded to whole blocks, with LOWEST.
"""

import triton
import triton.language as tl

from kdflow_kernels.jit_math import LN_2, LOG2_E, exp2, log

LOWEST = tl.constexpr(-1e30)  # problem.LOWEST_LOGIT
NO_COLUMN = tl.constexpr(2**30)
CACHE_DECIDES = tl.constexpr("")  # a plain string as a default does not compile under triton 3.6


@triton.jit
def _tanh(u):
    """sign(u) (1 - 2 / (exp(2|u|) + 1)), but near 0, where it would cancel, the series."""
    square = u * u
    series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
    far = 1.0 - 2.0 / (exp2(tl.abs(u) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(u) < 0.25, u * series, tl.where(u < 0.0, -far, far))


@triton.jit
def _transform(
    z, bias, indices, valid, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """softcap(scale * (z + bias))."""
    if HAS_BIAS:
        z += tl.load(bias + indices, mask=valid, other=0.0).to(tl.float32)
        z = tl.maximum(z, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    if HAS_SCALE:
        z *= scale
    if HAS_SOFTCAP:
        z = softcap * _tanh(z / softcap)
    return z


@triton.jit
def student_logits(
    z_row, columns, V, bias, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    EVICTION: tl.constexpr = CACHE_DECIDES,
):  # fmt: skip
    """Logits at temperature 1; LOWEST beyond V."""
    z = tl.load(z_row + columns, eviction_policy=EVICTION).to(tl.float32)
    if HAS_BIAS or HAS_SCALE or HAS_SOFTCAP:
        valid = columns < V
        z = _transform(z, bias, columns, valid, scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
        z = tl.where(valid, z, LOWEST)
    return z


@triton.jit
def logits(
    student_row, teacher_row, columns, V, K, ids,
    student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
    HAS_TEACHER: tl.constexpr, PARTIAL: tl.constexpr, PAIRED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    EVICTION: tl.constexpr = CACHE_DECIDES,
):  # fmt: skip
    """Logits at temperature 1: the student's, and student's and teacher's as compared, LOWEST where they are not."""
    z = student_logits(
        student_row, columns, V, student_bias, student_scale, student_softcap,
        STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, EVICTION,
    )  # fmt: skip
    x, y = z, z
    if PAIRED:
        indices = tl.load(ids + columns, mask=columns < V, other=-1)
        compared = indices >= 0
    else:
        indices = columns
        compared = columns < K
    if PARTIAL or PAIRED:
        x = tl.where(compared, x, LOWEST)
    if HAS_TEACHER:
        if PAIRED:
            y = tl.load(teacher_row + indices, mask=compared, other=LOWEST).to(tl.float32)
        else:
            y = tl.load(teacher_row + columns, eviction_policy=EVICTION).to(tl.float32)
        y = _transform(
            y, teacher_bias, indices, compared, teacher_scale, teacher_softcap,
            TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
        )  # fmt: skip
        # A load's `other` is of the pointer's type, in fp16 minus infinity.
        if PARTIAL or PAIRED or TEACHER_BIAS or TEACHER_SCALE or TEACHER_SOFTCAP:
            y = tl.where(compared, y, LOWEST)
    return z, x, y


@triton.jit
def take_in(x, step, exponent, m, total, moment, best):
    """One more block into each lane's maximum m, total = sum 2^d and moment = sum 2^d d with d = (x - m) exponent, and
    best, the step that brought m."""
    top = tl.max(x, 1)
    new_m = tl.maximum(m, top)
    shift = (m - new_m) * exponent
    decay = exp2(shift)
    # Not x exponent - m exponent: in one fused instruction that leaves the rounding of m exponent, which is large where
    # logits are, and huge where they are masked.
    d = (x - new_m[:, None]) * exponent
    e = exp2(d)
    moment = decay * (moment + total * shift) + tl.sum(e * d, 1)
    total = decay * total + tl.sum(e, 1)
    return new_m, total, moment, tl.where(top > m, step, best)


@triton.jit
def merge(exponent, m, total, moment):
    """Statistics of all lanes as one: (max, log total, entropy), the latter two in nats."""
    top = tl.max(m, 0)
    shift = (m - top) * exponent
    decay = exp2(shift)
    every = tl.sum(decay * total, 0)
    mean = tl.sum(decay * (moment + total * shift), 0) / every
    log_total = log(every)
    return top, log_total, log_total - mean * LN_2
