# pyright: reportAssignmentType=false
"""The row kernel: from blocks of whole rows of logits to the rows' terms and dloss/dlogits, in Triton.

Generic in the divergence, which comes as a JIT function. For each row:

1. one pass for the statistics of both softmaxes: maximum, sum of exponentials, entropy, most likely token;
2. where the sum over the vocabulary of df/dlog q is not known beforehand, one for it and for the loss;
3. one that writes dloss/dlogits, over the student's logits if they have the same dtype.

Every pass goes the other way than the one before, so that it begins with what is still in the cache; all but the end of a
pass is read and written as what the cache may give up first. All arithmetic is in fp32. What divergences of whole rows need beside this is found by statistics_kernels.

Legend: see jit_rows.
"""

import triton
import triton.language as tl

from kdflow_kernels.jit_math import LN_2, LOG2_E, exp2
from kdflow_kernels.jit_rows import LOWEST, NO_COLUMN, logits, merge, student_logits, take_in

SCALE_BLOCK = tl.constexpr(4096)


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
    labels, row_scale, row_parameters, choices, choice_gradients, active, gradient, gradient_stride,
    kd, ce, student_entropy, teacher_entropy, agreement, statistics,
    num_rows, V, K,
    inverse_temperature, kd_weight, ce_weight,
    student_scale, student_softcap, teacher_scale, teacher_softcap, parameter, filter_eps,
    POINTWISE: tl.constexpr, GRADIENT_SUM: tl.constexpr, ROW_PARAMETERS: tl.constexpr, NUM_CHOICES: tl.constexpr,
    FILTER: tl.constexpr,
    HAS_TEACHER: tl.constexpr, HAS_LABELS: tl.constexpr, KD_GRADIENT: tl.constexpr, CE_GRADIENT: tl.constexpr,
    PARTIAL: tl.constexpr, PAIRED: tl.constexpr, TEMPERED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, KEPT_SHARE: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th row of C.

    student (C, >= V) and teacher (C, >= K): logits before bias, scale and softcap. teacher_ids (V,): the teacher's column
    for each of the student's, -1 where it is not compared. gradient (C, >= V) may be student itself.

    row_parameters (C, 2): a parameter and the gradient sum of each row, instead of `parameter` and GRADIENT_SUM.
    choices, choice_gradients (C, NUM_CHOICES): columns, repeated ones adding up, and df/dlog q there, nothing elsewhere;
    kd is then not written. active (V,) bytes: set to 1 where the row loss's derivative exceeds filter_eps in any row.

    STAGE: "whole" rows; of rows cut over ranks, whose labels are -1 beyond these columns, "own" writes what pass 1 finds of
    the columns to statistics (11, C): maximum, log of the sum, entropy and the maximum's column of the student, the same of
    the teacher, maximum and log of the sum at temperature 1, the label's logit. "given" takes statistics (7, C) of all
    columns instead of pass 1: maximum and log of the sum of the student, of the teacher, at temperature 1; and the gradient
    sum, or with pass 2 it is put there.

    KEPT_SHARE: the last of so many parts of a pass is for the next pass to find in the cache; 0: the cache decides.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    # Cross-entropy has statistics of its own unless temperature and columns are the divergence's.
    # Not by STAGE != "whole", which Triton's compiler takes for true.
    OWN_CE: tl.constexpr = HAS_LABELS and (TEMPERED or PARTIAL or PAIRED or STAGE == "own" or STAGE == "given")
    FORM_GRADIENT: tl.constexpr = KD_GRADIENT or CE_GRADIENT
    SUM_KNOWN: tl.constexpr = ROW_PARAMETERS or GRADIENT_SUM is not None or STAGE == "given"
    SUM_PASS: tl.constexpr = POINTWISE is not None and not (SUM_KNOWN and KD_GRADIENT)
    PADDING: tl.constexpr = -65504.0 if gradient.dtype.element_ty == tl.float16 else LOWEST

    # A pass is cut in two where that begins which is to stay in the cache until the next one reads it.
    LAST_PART: tl.constexpr = 1 if KEPT_SHARE > 0 else 0
    READ_LAST: tl.constexpr = "evict_first" if KEPT_SHARE > 0 else ""

    exponent = inverse_temperature * LOG2_E
    lanes = tl.arange(0, LANES)
    offsets = lanes[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    last = tl.cdiv(V, BLOCK) - 1
    kept_from = 0
    if KEPT_SHARE > 0:
        kept_from = last + 1 - tl.cdiv(last + 1, KEPT_SHARE)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        student_row = student + row * student_stride
        teacher_row = teacher + row * teacher_stride
        gradient_row = gradient + row * gradient_stride

        if STAGE == "given":
            label = tl.load(labels + row).to(tl.int32) if HAS_LABELS else 0
            top_s, log_sum_s = tl.load(statistics + row), tl.load(statistics + num_rows + row)
            top_t, log_sum_t = tl.load(statistics + 2 * num_rows + row), tl.load(statistics + 3 * num_rows + row)
            top_z, log_sum_z = tl.load(statistics + 4 * num_rows + row), tl.load(statistics + 5 * num_rows + row)
        else:
            m_s = tl.full((LANES,), LOWEST, tl.float32)
            total_s = tl.zeros((LANES,), tl.float32)
            moment_s = tl.zeros((LANES,), tl.float32)
            best_s = tl.zeros((LANES,), tl.int32)
            m_t, total_t, moment_t, best_t = m_s, total_s, moment_s, best_s
            m_z, total_z, moment_z, best_z = m_s, total_s, moment_s, best_s
            for part in tl.static_range(LAST_PART + 1):
                for step in range(part * kept_from, kept_from if part < LAST_PART else last + 1):
                    columns = step * BLOCK + offsets
                    z, x, y = logits(
                        student_row, teacher_row, columns, V, K, teacher_ids,
                        student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                        HAS_TEACHER, PARTIAL, PAIRED,
                        STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                        READ_LAST if part < LAST_PART else "",
                    )  # fmt: skip
                    m_s, total_s, moment_s, best_s = take_in(x, step, exponent, m_s, total_s, moment_s, best_s)
                    if HAS_TEACHER:
                        m_t, total_t, moment_t, best_t = take_in(y, step, exponent, m_t, total_t, moment_t, best_t)
                    if OWN_CE:
                        m_z, total_z, moment_z, best_z = take_in(z, step, LOG2_E, m_z, total_z, moment_z, best_z)
            top_s, log_sum_s, entropy_s = merge(exponent, m_s, total_s, moment_s)
            top_z, log_sum_z = top_s, log_sum_s
            if OWN_CE:
                top_z, log_sum_z, _ = merge(LOG2_E, m_z, total_z, moment_z)
            if STAGE == "own":
                tl.store(statistics + row, top_s)
                tl.store(statistics + num_rows + row, log_sum_s)
                tl.store(statistics + 2 * num_rows + row, entropy_s)
                tl.store(statistics + 8 * num_rows + row, top_z)
                tl.store(statistics + 9 * num_rows + row, log_sum_z)
            else:
                tl.store(student_entropy + row, entropy_s)
            label = 0
            if HAS_LABELS:
                label = tl.load(labels + row).to(tl.int32)
                if STAGE == "own":
                    label = tl.maximum(label, 0)
                z_label = student_logits(
                    student_row, label, V, student_bias, student_scale, student_softcap,
                    STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP,
                )  # fmt: skip
                if STAGE == "own":
                    tl.store(statistics + 10 * num_rows + row, z_label)
                else:
                    tl.store(ce + row, log_sum_z - (z_label - top_z))
            top_t, log_sum_t = top_s, log_sum_s
            if HAS_TEACHER:
                top_t, log_sum_t, entropy_t = merge(exponent, m_t, total_t, moment_t)
                if STAGE == "own":
                    tl.store(statistics + 4 * num_rows + row, top_t)
                    tl.store(statistics + 5 * num_rows + row, log_sum_t)
                    tl.store(statistics + 6 * num_rows + row, entropy_t)
                else:
                    tl.store(teacher_entropy + row, entropy_t)
                # Both first choices, exactly, from the WIDTH columns around them.
                near = tl.arange(0, WIDTH)
                few = _first_block(m_s, top_s, best_s, lanes, BLOCK, WIDTH) + near
                few = tl.where(few < V, few, 0)
                _, x_few, _ = logits(
                    student_row, teacher_row, few, V, K, teacher_ids,
                    student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                    HAS_TEACHER, PARTIAL, PAIRED,
                    STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                )  # fmt: skip
                column_s = tl.min(tl.where(x_few == top_s, few, NO_COLUMN), 0)
                few = _first_block(m_t, top_t, best_t, lanes, BLOCK, WIDTH) + near
                few = tl.where(few < V, few, 0)
                _, _, y_few = logits(
                    student_row, teacher_row, few, V, K, teacher_ids,
                    student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                    HAS_TEACHER, PARTIAL, PAIRED,
                    STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                )  # fmt: skip
                column_t = tl.min(tl.where(y_few == top_t, few, NO_COLUMN), 0)
                if STAGE == "own":
                    tl.store(statistics + 3 * num_rows + row, column_s.to(tl.float32))
                    tl.store(statistics + 7 * num_rows + row, column_t.to(tl.float32))
                else:
                    tl.store(agreement + row, tl.where(column_s == column_t, 1.0, 0.0))

        loss = tl.zeros((LANES,), tl.float32)
        gradient_sum = 0.0
        if GRADIENT_SUM is not None:
            gradient_sum = GRADIENT_SUM
        if ROW_PARAMETERS:
            parameter = tl.load(row_parameters + row * 2)
            gradient_sum = tl.load(row_parameters + row * 2 + 1)
        if STAGE == "given" and GRADIENT_SUM is None:
            gradient_sum = tl.load(statistics + 6 * num_rows + row)
        for choice in range(NUM_CHOICES):
            gradient_sum += tl.load(choice_gradients + row * NUM_CHOICES + choice)
        if SUM_PASS:
            sums = tl.zeros((LANES,), tl.float32)
            for part in tl.static_range(LAST_PART + 1):
                for backwards in range(part * kept_from, kept_from if part < LAST_PART else last + 1):
                    columns = (last - backwards) * BLOCK + offsets
                    z, x, y = logits(
                        student_row, teacher_row, columns, V, K, teacher_ids,
                        student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                        HAS_TEACHER, PARTIAL, PAIRED,
                        STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                        READ_LAST if part < LAST_PART or not FORM_GRADIENT else "",
                    )  # fmt: skip
                    f, g, q = _terms(x, y, exponent, top_s, log_sum_s, top_t, log_sum_t, parameter, POINTWISE)
                    loss += tl.sum(f, 1)
                    sums += tl.sum(g, 1)
            gradient_sum = tl.sum(sums, 0)
            if STAGE == "given":
                tl.store(statistics + 6 * num_rows + row, gradient_sum)

        if FORM_GRADIENT:
            scale = tl.load(row_scale + row)
            kd_scale = scale * kd_weight * inverse_temperature
            ce_scale = scale * ce_weight
            for count in range(last + 1):
                step = count if SUM_PASS else last - count
                columns = step * BLOCK + offsets
                z, x, y = logits(
                    student_row, teacher_row, columns, V, K, teacher_ids,
                    student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                    HAS_TEACHER, PARTIAL, PAIRED,
                    STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                    READ_LAST,
                )  # fmt: skip
                dz = tl.zeros((LANES, WIDTH), tl.float32)
                if KD_GRADIENT:
                    if NUM_CHOICES == 0:
                        f, g, q = _terms(x, y, exponent, top_s, log_sum_s, top_t, log_sum_t, parameter, POINTWISE)
                        if not SUM_PASS:
                            loss += tl.sum(f, 1)
                        dz = kd_scale * (g - q * gradient_sum)
                    else:
                        q = exp2((x - top_s) * exponent - log_sum_s * LOG2_E)
                        dz = q * (-kd_scale * gradient_sum)
                        for choice in range(NUM_CHOICES):
                            column = tl.load(choices + row * NUM_CHOICES + choice)
                            if column // BLOCK == step:
                                g_here = tl.load(choice_gradients + row * NUM_CHOICES + choice)
                                dz += tl.where(columns == column, kd_scale * g_here, 0.0)
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
                if FILTER:
                    exceeds = (tl.abs(dz) > filter_eps * tl.abs(scale)) & (columns < V)
                    tl.store(active + columns, tl.full((LANES, WIDTH), 1, tl.int8), mask=exceeds)
                if step == last:
                    # The padding stays without mass; a masked store would be cut into single elements.
                    dz = tl.where(columns < V, dz, PADDING)
                tl.store(gradient_row + columns, dz.to(gradient.dtype.element_ty), eviction_policy=READ_LAST)
        if POINTWISE is not None:
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
