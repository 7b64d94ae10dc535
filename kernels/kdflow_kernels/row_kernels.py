# pyright: reportAssignmentType=false
"""The row kernel: from blocks of whole rows of logits to the rows' terms and dloss/dlogits, in Triton.

Generic in the divergence, which comes as a JIT function. For each row:

1. one pass for the statistics of both softmaxes: maximum, sum of exponentials, entropy, most likely token;
2. where the sum over the vocabulary of df/dlog q is not known beforehand, one for it and for the loss;
3. one that writes dloss/dlogits, over the student's logits if they have the same dtype.

Every pass goes the other way than the one before, so that it begins with what is still in the cache. Logits are read as
stored and turned into fp32; all arithmetic is in fp32. Exponentials are powers of 2 of logits times `exponent`, which is
log2(e) / temperature.

Legend: V columns of the student, K of them compared; a block of columns is (LANES, WIDTH), WIDTH neighbours being what one
thread loads at once. Rows are padded to whole blocks, with LOWEST.
"""

import triton
import triton.language as tl

from kdflow_kernels.jit_math import LN_2, LOG2_E, exp2, log

LOWEST = tl.constexpr(-1e30)  # problem.LOWEST_LOGIT
NO_COLUMN = tl.constexpr(2**30)
SCALE_BLOCK = tl.constexpr(4096)


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
def _student_logits(
    z_row, columns, V, bias, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    """Logits at temperature 1; LOWEST beyond V."""
    z = tl.load(z_row + columns).to(tl.float32)
    if HAS_BIAS or HAS_SCALE or HAS_SOFTCAP:
        valid = columns < V
        z = _transform(z, bias, columns, valid, scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
        z = tl.where(valid, z, LOWEST)
    return z


@triton.jit
def _logits(
    student_row, teacher_row, columns, V, K, ids,
    student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
    HAS_TEACHER: tl.constexpr, PARTIAL: tl.constexpr, PAIRED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits at temperature 1: the student's, and student's and teacher's as compared, LOWEST where they are not."""
    z = _student_logits(
        student_row, columns, V, student_bias, student_scale, student_softcap,
        STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP,
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
            y = tl.load(teacher_row + columns).to(tl.float32)
        y = _transform(
            y, teacher_bias, indices, compared, teacher_scale, teacher_softcap,
            TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
        )  # fmt: skip
        if PARTIAL or TEACHER_BIAS or TEACHER_SCALE or TEACHER_SOFTCAP:
            y = tl.where(compared, y, LOWEST)
    return z, x, y


@triton.jit
def _take_in(x, step, exponent, m, total, moment, best):
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
def _merge(exponent, m, total, moment):
    """Statistics of all lanes as one: (max, log total, entropy), the latter two in nats."""
    top = tl.max(m, 0)
    shift = (m - top) * exponent
    decay = exp2(shift)
    every = tl.sum(decay * total, 0)
    mean = tl.sum(decay * (moment + total * shift), 0) / every
    log_total = log(every)
    return top, log_total, log_total - mean * LN_2


@triton.jit
def _first_block(m, top, best, lanes, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """First column of the first WIDTH columns that hold the maximum."""
    return tl.min(tl.where(m == top, best * BLOCK + lanes * WIDTH, NO_COLUMN), 0)


@triton.jit
def _terms(x, y, exponent, top_s, log_sum_s, top_t, log_sum_t, parameter, POINTWISE: tl.constexpr):
    """The divergence's f and df/dlog q, and q."""
    d_s, d_t = (x - top_s) * exponent, (y - top_t) * exponent
    p, q = exp2(d_t - log_sum_t * LOG2_E), exp2(d_s - log_sum_s * LOG2_E)
    f, g = POINTWISE(d_t * LN_2 - log_sum_t, d_s * LN_2 - log_sum_s, p, q, parameter)
    return f, g, q


@triton.jit
def row_kernel(
    student, student_stride, teacher, teacher_stride, teacher_ids, student_bias, teacher_bias,
    labels, row_scale, gradient, gradient_stride,
    kd, ce, student_entropy, teacher_entropy, agreement,
    num_rows, V, K,
    inverse_temperature, kd_weight, ce_weight,
    student_scale, student_softcap, teacher_scale, teacher_softcap, parameter,
    POINTWISE: tl.constexpr, GRADIENT_SUM: tl.constexpr,
    HAS_TEACHER: tl.constexpr, HAS_LABELS: tl.constexpr, KD_GRADIENT: tl.constexpr, CE_GRADIENT: tl.constexpr,
    PARTIAL: tl.constexpr, PAIRED: tl.constexpr, TEMPERED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th row of C.

    student (C, >= V) and teacher (C, >= K): logits before bias, scale and softcap. teacher_ids (V,): the teacher's column
    for each of the student's, -1 where it is not compared. gradient (C, >= V) may be student itself.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    # Cross-entropy has statistics of its own unless temperature and columns are the divergence's.
    OWN_CE: tl.constexpr = HAS_LABELS and (TEMPERED or PARTIAL or PAIRED)
    FORM_GRADIENT: tl.constexpr = KD_GRADIENT or CE_GRADIENT
    SUM_PASS: tl.constexpr = HAS_TEACHER and (GRADIENT_SUM is None or not KD_GRADIENT)
    PADDING: tl.constexpr = -65504.0 if gradient.dtype.element_ty == tl.float16 else LOWEST

    exponent = inverse_temperature * LOG2_E
    lanes = tl.arange(0, LANES)
    offsets = lanes[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    last = tl.cdiv(V, BLOCK) - 1
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        student_row = student + row * student_stride
        teacher_row = teacher + row * teacher_stride
        gradient_row = gradient + row * gradient_stride

        m_s = tl.full((LANES,), LOWEST, tl.float32)
        total_s = tl.zeros((LANES,), tl.float32)
        moment_s = tl.zeros((LANES,), tl.float32)
        best_s = tl.zeros((LANES,), tl.int32)
        m_t, total_t, moment_t, best_t = m_s, total_s, moment_s, best_s
        m_z, total_z, moment_z, best_z = m_s, total_s, moment_s, best_s
        for step in range(last + 1):
            columns = step * BLOCK + offsets
            z, x, y = _logits(
                student_row, teacher_row, columns, V, K, teacher_ids,
                student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                HAS_TEACHER, PARTIAL, PAIRED,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            m_s, total_s, moment_s, best_s = _take_in(x, step, exponent, m_s, total_s, moment_s, best_s)
            if HAS_TEACHER:
                m_t, total_t, moment_t, best_t = _take_in(y, step, exponent, m_t, total_t, moment_t, best_t)
            if OWN_CE:
                m_z, total_z, moment_z, best_z = _take_in(z, step, LOG2_E, m_z, total_z, moment_z, best_z)
        top_s, log_sum_s, entropy_s = _merge(exponent, m_s, total_s, moment_s)
        top_z, log_sum_z = top_s, log_sum_s
        if OWN_CE:
            top_z, log_sum_z, _ = _merge(LOG2_E, m_z, total_z, moment_z)
        tl.store(student_entropy + row, entropy_s)
        label = 0
        if HAS_LABELS:
            label = tl.load(labels + row).to(tl.int32)
            z_label = _student_logits(
                student_row, label, V, student_bias, student_scale, student_softcap,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP,
            )  # fmt: skip
            tl.store(ce + row, log_sum_z - (z_label - top_z))
        top_t, log_sum_t = top_s, log_sum_s
        if HAS_TEACHER:
            top_t, log_sum_t, entropy_t = _merge(exponent, m_t, total_t, moment_t)
            tl.store(teacher_entropy + row, entropy_t)
            # Both first choices, exactly, from the WIDTH columns around them.
            near = tl.arange(0, WIDTH)
            few = _first_block(m_s, top_s, best_s, lanes, BLOCK, WIDTH) + near
            few = tl.where(few < V, few, 0)
            _, x_few, _ = _logits(
                student_row, teacher_row, few, V, K, teacher_ids,
                student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                HAS_TEACHER, PARTIAL, PAIRED,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            column_s = tl.min(tl.where(x_few == top_s, few, NO_COLUMN), 0)
            few = _first_block(m_t, top_t, best_t, lanes, BLOCK, WIDTH) + near
            few = tl.where(few < V, few, 0)
            _, _, y_few = _logits(
                student_row, teacher_row, few, V, K, teacher_ids,
                student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                HAS_TEACHER, PARTIAL, PAIRED,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            column_t = tl.min(tl.where(y_few == top_t, few, NO_COLUMN), 0)
            tl.store(agreement + row, tl.where(column_s == column_t, 1.0, 0.0))

        loss = tl.zeros((LANES,), tl.float32)
        gradient_sum = 0.0
        if HAS_TEACHER and GRADIENT_SUM is not None:
            gradient_sum = GRADIENT_SUM
        if SUM_PASS:
            sums = tl.zeros((LANES,), tl.float32)
            for backwards in range(last + 1):
                columns = (last - backwards) * BLOCK + offsets
                z, x, y = _logits(
                    student_row, teacher_row, columns, V, K, teacher_ids,
                    student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                    HAS_TEACHER, PARTIAL, PAIRED,
                    STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                )  # fmt: skip
                f, g, q = _terms(x, y, exponent, top_s, log_sum_s, top_t, log_sum_t, parameter, POINTWISE)
                loss += tl.sum(f, 1)
                sums += tl.sum(g, 1)
            gradient_sum = tl.sum(sums, 0)

        if FORM_GRADIENT:
            scale = tl.load(row_scale + row)
            kd_scale = scale * kd_weight * inverse_temperature
            ce_scale = scale * ce_weight
            for count in range(last + 1):
                step = count if SUM_PASS else last - count
                columns = step * BLOCK + offsets
                z, x, y = _logits(
                    student_row, teacher_row, columns, V, K, teacher_ids,
                    student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                    HAS_TEACHER, PARTIAL, PAIRED,
                    STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                )  # fmt: skip
                dz = tl.zeros((LANES, WIDTH), tl.float32)
                if KD_GRADIENT:
                    f, g, q = _terms(x, y, exponent, top_s, log_sum_s, top_t, log_sum_t, parameter, POINTWISE)
                    if not SUM_PASS:
                        loss += tl.sum(f, 1)
                    dz = kd_scale * (g - q * gradient_sum)
                    if CE_GRADIENT and not OWN_CE:
                        dz += ce_scale * q
                if CE_GRADIENT:
                    if OWN_CE or not KD_GRADIENT:
                        dz += ce_scale * exp2((z - top_z) * LOG2_E - log_sum_z * LOG2_E)
                    dz -= tl.where(columns == label, ce_scale, 0.0)
                if STUDENT_SOFTCAP:
                    ratio = z / student_softcap
                    dz *= 1.0 - ratio * ratio
                if STUDENT_SCALE:
                    dz *= student_scale
                if step == last:
                    # The padding stays without mass; a masked store would be cut into single elements.
                    dz = tl.where(columns < V, dz, PADDING)
                tl.store(gradient_row + columns, dz.to(gradient.dtype.element_ty))
        if HAS_TEACHER:
            tl.store(kd + row, tl.sum(loss, 0))


@triton.jit
def scale_kernel(gradient, factor, count):
    """gradient *= factor, but for factor 1, where there is nothing to do."""
    value = tl.load(factor).to(tl.float32)
    if value != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, SCALE_BLOCK), tl.num_programs(0)):
            offsets = tl.cast(block, tl.int64) * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
            found = tl.load(gradient + offsets, mask=offsets < count).to(tl.float32)
            tl.store(gradient + offsets, (found * value).to(gradient.dtype.element_ty), mask=offsets < count)
