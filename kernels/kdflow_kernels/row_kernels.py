"""The row kernel: from blocks of whole rows of logits to the rows' terms and dloss/dlogits, in Triton.

Generic in the divergence, which comes as a JIT function. For each row:

1. one pass for the statistics of both softmaxes: maximum, sum of exponentials, entropy, most likely token;
2. where the sum over the vocabulary of df/dlog q is not known beforehand, one for it and for the loss;
3. one that writes dloss/dlogits, over the student's logits if they have the same dtype.

A row belongs to SPLITS programs, which exchange their parts through memory and wait for one another: the fewer rows are
in flight, the sooner a row is read again, from the cache and not from memory. All programs must then run at once; the
launcher sees to it. Logits are read as stored and turned into fp32; all arithmetic is in fp32.

Legend: V columns of the student, K of them compared; a block of columns is (LANES, WIDTH), WIDTH neighbours being what one
thread loads at once. Rows are padded to whole blocks, with LOWEST.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-1e30)  # problem.LOWEST_LOGIT
NO_COLUMN = tl.constexpr(2**30)
SCALE_BLOCK = tl.constexpr(4096)
STATISTICS = tl.constexpr(12)  # room in `partials` for what a program tells the others of its row


@triton.jit
def _tanh(u):
    """sign(u) (1 - 2 / (exp(2|u|) + 1)), but near 0, where it would cancel, the series."""
    square = u * u
    series = 1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))))
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(u)) + 1.0)
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
def _compared_logits(
    z, z_row, columns, V, K, ids, bias, scale, softcap, inverse_temperature,
    PARTIAL: tl.constexpr, PAIRED: tl.constexpr, HAS_TEACHER: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Tempered logits of student (from z) and teacher, as the divergence compares them; LOWEST elsewhere."""
    x = z * inverse_temperature
    y = x
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
            y = tl.load(z_row + indices, mask=compared, other=LOWEST).to(tl.float32)
        else:
            y = tl.load(z_row + columns).to(tl.float32)
        y = _transform(y, bias, indices, compared, scale, softcap, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP)
        y *= inverse_temperature
        if PARTIAL or HAS_BIAS or HAS_SCALE or HAS_SOFTCAP:
            y = tl.where(compared, y, LOWEST)
    return x, y


@triton.jit
def _take_in(x, step, m, total, moment, best):
    """One more block into each lane's maximum m, total = sum exp(x - m), moment = sum exp(x - m)(x - m) and best, the
    step that brought m."""
    top = tl.max(x, 1)
    new_m = tl.maximum(m, top)
    shift = m - new_m
    decay = tl.exp(shift)
    distance = x - new_m[:, None]
    e = tl.exp(distance)
    moment = decay * (moment + total * shift) + tl.sum(e * distance, 1)
    total = decay * total + tl.sum(e, 1)
    return new_m, total, moment, tl.where(top > m, step, best)


@triton.jit
def _merge(m, total, moment):
    """Statistics of several lanes (or programs) as one."""
    top = tl.max(m, 0)
    shift = m - top
    decay = tl.exp(shift)
    return top, tl.sum(decay * total, 0), tl.sum(decay * (moment + total * shift), 0)


@triton.jit
def _first_block(m, top, best, lanes, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """First column of the first WIDTH columns that hold the maximum."""
    return tl.min(tl.where(m == top, best * BLOCK + lanes * WIDTH, NO_COLUMN), 0)


@triton.jit
def _exchange(arrivals, target):
    """Waits until all programs of a row have come here."""
    tl.debug_barrier()
    tl.atomic_add(arrivals, 1, sem="acq_rel", scope="gpu")
    while tl.atomic_add(arrivals, 0, sem="acq_rel", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def row_kernel(
    student, student_stride, teacher, teacher_stride, teacher_ids, student_bias, teacher_bias,
    labels, row_scale, gradient, gradient_stride,
    kd, ce, student_entropy, teacher_entropy, agreement, partials, arrivals,
    num_rows, V, K,
    inverse_temperature, kd_weight, ce_weight,
    student_scale, student_softcap, teacher_scale, teacher_softcap, parameter,
    POINTWISE: tl.constexpr, GRADIENT_SUM: tl.constexpr,
    HAS_TEACHER: tl.constexpr, HAS_LABELS: tl.constexpr, KD_GRADIENT: tl.constexpr, CE_GRADIENT: tl.constexpr,
    PARTIAL: tl.constexpr, PAIRED: tl.constexpr, TEMPERED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Rows program // SPLITS, and every so many on; of each the blocks program % SPLITS, and every SPLITS on.

    student (C, >= V) and teacher (C, >= K): logits before bias, scale and softcap. teacher_ids (V,): the teacher's column
    for each of the student's, -1 where it is not compared. gradient (C, >= V) may be student itself. kd (C, SPLITS): what
    each program adds to the row's divergence. partials (C, SPLITS, STATISTICS) and arrivals (C,), zeros: for the exchange.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    # Cross-entropy has statistics of its own unless temperature and columns are the divergence's.
    OWN_CE: tl.constexpr = HAS_LABELS and (TEMPERED or PARTIAL or PAIRED)
    FORM_GRADIENT: tl.constexpr = KD_GRADIENT or CE_GRADIENT
    SUM_PASS: tl.constexpr = HAS_TEACHER and (GRADIENT_SUM is None or not KD_GRADIENT)

    PADDING: tl.constexpr = -65504.0 if gradient.dtype.element_ty == tl.float16 else LOWEST
    lanes = tl.arange(0, LANES)
    offsets = lanes[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    split = tl.program_id(0) % SPLITS
    num_steps = tl.cdiv(V, BLOCK)
    for row in range(tl.program_id(0) // SPLITS, num_rows, tl.num_programs(0) // SPLITS):
        student_row = student + row * student_stride
        teacher_row = teacher + row * teacher_stride
        gradient_row = gradient + row * gradient_stride
        parts = partials + row * (SPLITS * STATISTICS)

        m_s = tl.full((LANES,), LOWEST, tl.float32)
        total_s = tl.zeros((LANES,), tl.float32)
        moment_s = tl.zeros((LANES,), tl.float32)
        best_s = tl.zeros((LANES,), tl.int32)
        m_t, total_t, moment_t, best_t = m_s, total_s, moment_s, best_s
        m_ce, total_ce, moment_ce, best_ce = m_s, total_s, moment_s, best_s
        for step in range(split, num_steps, SPLITS):
            columns = step * BLOCK + offsets
            z = _student_logits(
                student_row, columns, V, student_bias, student_scale, student_softcap,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP,
            )  # fmt: skip
            x, y = _compared_logits(
                z, teacher_row, columns, V, K, teacher_ids, teacher_bias, teacher_scale, teacher_softcap,
                inverse_temperature, PARTIAL, PAIRED, HAS_TEACHER, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            m_s, total_s, moment_s, best_s = _take_in(x, step, m_s, total_s, moment_s, best_s)
            if HAS_TEACHER:
                m_t, total_t, moment_t, best_t = _take_in(y, step, m_t, total_t, moment_t, best_t)
            if OWN_CE:
                m_ce, total_ce, moment_ce, best_ce = _take_in(z, step, m_ce, total_ce, moment_ce, best_ce)
        top_s, sum_s, mean_s = _merge(m_s, total_s, moment_s)
        top_t, sum_t, mean_t = _merge(m_t, total_t, moment_t)
        top_ce, sum_ce, _ = _merge(m_ce, total_ce, moment_ce)

        # The most likely token, exactly, from the WIDTH columns around it.
        near = tl.arange(0, WIDTH)
        column_s = top_s.to(tl.int32) * 0
        column_t = column_s
        if HAS_TEACHER:
            few = _first_block(m_s, top_s, best_s, lanes, BLOCK, WIDTH) + near
            few = tl.where(few < V, few, 0)
            z_few = _student_logits(
                student_row, few, V, student_bias, student_scale, student_softcap,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP,
            )  # fmt: skip
            x_few, y_few = _compared_logits(
                z_few, teacher_row, few, V, K, teacher_ids, teacher_bias, teacher_scale, teacher_softcap,
                inverse_temperature, PARTIAL, PAIRED, HAS_TEACHER, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            column_s = tl.min(tl.where(x_few == top_s, few, NO_COLUMN), 0)
            few = _first_block(m_t, top_t, best_t, lanes, BLOCK, WIDTH) + near
            few = tl.where(few < V, few, 0)
            x_few, y_few = _compared_logits(
                z_few, teacher_row, few, V, K, teacher_ids, teacher_bias, teacher_scale, teacher_softcap,
                inverse_temperature, PARTIAL, PAIRED, HAS_TEACHER, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            column_t = tl.min(tl.where(y_few == top_t, few, NO_COLUMN), 0)
        label = column_s * 0
        z_label = top_s
        if HAS_LABELS:
            label = tl.load(labels + row).to(tl.int32)
            # Read before any program of the row may write a gradient over it.
            z_label = _student_logits(
                student_row, label, V, student_bias, student_scale, student_softcap,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP,
            )  # fmt: skip

        if SPLITS > 1:
            mine = parts + split * STATISTICS
            tl.store(mine, top_s)
            tl.store(mine + 1, sum_s)
            tl.store(mine + 2, mean_s)
            tl.store(mine + 3, column_s.to(tl.float32))
            if HAS_TEACHER:
                tl.store(mine + 4, top_t)
                tl.store(mine + 5, sum_t)
                tl.store(mine + 6, mean_t)
                tl.store(mine + 7, column_t.to(tl.float32))
            if OWN_CE:
                tl.store(mine + 8, top_ce)
                tl.store(mine + 9, sum_ce)
            _exchange(arrivals + row, SPLITS)
            every = parts + tl.arange(0, SPLITS) * STATISTICS
            tops = tl.load(every, cache_modifier=".cg")
            firsts = tl.load(every + 3, cache_modifier=".cg")
            top_s, sum_s, mean_s = _merge(
                tops, tl.load(every + 1, cache_modifier=".cg"), tl.load(every + 2, cache_modifier=".cg")
            )
            column_s = tl.min(tl.where(tops == top_s, firsts, 2.0**30), 0).to(tl.int32)
            if HAS_TEACHER:
                tops = tl.load(every + 4, cache_modifier=".cg")
                firsts = tl.load(every + 7, cache_modifier=".cg")
                top_t, sum_t, mean_t = _merge(
                    tops, tl.load(every + 5, cache_modifier=".cg"), tl.load(every + 6, cache_modifier=".cg")
                )
                column_t = tl.min(tl.where(tops == top_t, firsts, 2.0**30), 0).to(tl.int32)
            if OWN_CE:
                tops = tl.load(every + 8, cache_modifier=".cg")
                sums = tl.load(every + 9, cache_modifier=".cg")
                top_ce, sum_ce, _ = _merge(tops, sums, sums)

        # log_softmax is (x - top) - log_sum: top + log_sum would round where logits are large.
        log_sum_s, log_sum_t = tl.log(sum_s), tl.log(sum_t)
        top_z, log_sum_z = top_s, log_sum_s
        if OWN_CE:
            top_z, log_sum_z = top_ce, tl.log(sum_ce)
        if split == 0:
            tl.store(student_entropy + row, log_sum_s - mean_s / sum_s)
            if HAS_TEACHER:
                tl.store(teacher_entropy + row, log_sum_t - mean_t / sum_t)
                tl.store(agreement + row, tl.where(column_s == column_t, 1.0, 0.0))
            if HAS_LABELS:
                tl.store(ce + row, log_sum_z - (z_label - top_z))

        loss = tl.zeros((LANES,), tl.float32)
        gradient_sum = 0.0
        if HAS_TEACHER and GRADIENT_SUM is not None:
            gradient_sum = GRADIENT_SUM
        if SUM_PASS:
            sums = tl.zeros((LANES,), tl.float32)
            for step in range(split, num_steps, SPLITS):
                columns = step * BLOCK + offsets
                z = _student_logits(
                    student_row, columns, V, student_bias, student_scale, student_softcap,
                    STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP,
                )  # fmt: skip
                x, y = _compared_logits(
                    z, teacher_row, columns, V, K, teacher_ids, teacher_bias, teacher_scale, teacher_softcap,
                    inverse_temperature, PARTIAL, PAIRED, HAS_TEACHER, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                )  # fmt: skip
                log_q, log_p = (x - top_s) - log_sum_s, (y - top_t) - log_sum_t
                f, g = POINTWISE(log_p, log_q, tl.exp(log_p), tl.exp(log_q), parameter)
                loss += tl.sum(f, 1)
                sums += tl.sum(g, 1)
            gradient_sum = tl.sum(sums, 0)
            if SPLITS > 1 and KD_GRADIENT:
                tl.store(parts + split * STATISTICS + 10, gradient_sum)
                _exchange(arrivals + row, 2 * SPLITS)
                every = parts + tl.arange(0, SPLITS) * STATISTICS
                gradient_sum = tl.sum(tl.load(every + 10, cache_modifier=".cg"), 0)

        if FORM_GRADIENT:
            scale = tl.load(row_scale + row)
            kd_scale = scale * kd_weight * inverse_temperature
            ce_scale = scale * ce_weight
            for step in range(split, num_steps, SPLITS):
                columns = step * BLOCK + offsets
                z = _student_logits(
                    student_row, columns, V, student_bias, student_scale, student_softcap,
                    STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP,
                )  # fmt: skip
                dz = tl.zeros((LANES, WIDTH), tl.float32)
                if KD_GRADIENT:
                    x, y = _compared_logits(
                        z, teacher_row, columns, V, K, teacher_ids, teacher_bias, teacher_scale, teacher_softcap,
                        inverse_temperature, PARTIAL, PAIRED, HAS_TEACHER, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                    )  # fmt: skip
                    log_q, log_p = (x - top_s) - log_sum_s, (y - top_t) - log_sum_t
                    q = tl.exp(log_q)
                    f, g = POINTWISE(log_p, log_q, tl.exp(log_p), q, parameter)
                    if not SUM_PASS:
                        loss += tl.sum(f, 1)
                    dz = kd_scale * (g - q * gradient_sum)
                    if CE_GRADIENT and not OWN_CE:
                        dz += ce_scale * q
                if CE_GRADIENT:
                    if OWN_CE or not KD_GRADIENT:
                        dz += ce_scale * tl.exp((z - top_z) - log_sum_z)
                    dz -= tl.where(columns == label, ce_scale, 0.0)
                if STUDENT_SOFTCAP:
                    ratio = z / student_softcap
                    dz *= 1.0 - ratio * ratio
                if STUDENT_SCALE:
                    dz *= student_scale
                # The padding stays without mass; masking the store instead would cut it into single elements.
                dz = tl.where(columns < V, dz, PADDING)
                tl.store(gradient_row + columns, dz.to(gradient.dtype.element_ty))
        if HAS_TEACHER:
            tl.store(kd + row * SPLITS + split, tl.sum(loss, 0))


@triton.jit
def scale_kernel(gradient, factor, count):
    """gradient *= factor, but for factor 1, where there is nothing to do."""
    value = tl.load(factor).to(tl.float32)
    if value != 1.0:
        for block in range(tl.program_id(0), tl.cdiv(count, SCALE_BLOCK), tl.num_programs(0)):
            offsets = tl.cast(block, tl.int64) * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
            found = tl.load(gradient + offsets, mask=offsets < count).to(tl.float32)
            tl.store(gradient + offsets, (found * value).to(gradient.dtype.element_ty), mask=offsets < count)
