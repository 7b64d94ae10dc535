# pyright: reportAssignmentType=false
"""What divergences of whole rows need to know of a row before the row kernel can form its gradient, in Triton.

tail_share_kernel: how much of a row's |p - q| lies in the teacher's tail; no sorting, a search for the tail's last token.
choice_kernel: the first choices of teacher and student, and the divergence of these few tokens.

Legend: see jit_rows.
"""

import triton
import triton.language as tl

from kdflow_kernels.jit_math import LN_2, LOG2_E, exp2
from kdflow_kernels.jit_rows import LOWEST, NO_COLUMN, logits, merge, take_in

HUGE = tl.constexpr(3e38)


@triton.jit
def tail_share_kernel(
    student, student_stride, teacher, teacher_stride, teacher_ids, student_bias, teacher_bias, row_parameters,
    num_rows, V, K, inverse_temperature, student_scale, student_softcap, teacher_scale, teacher_softcap, parameter,
    PARTIAL: tl.constexpr, PAIRED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """row_parameters (C, 2): adaptive KL's share s of the tail, and the sum over the vocabulary of its df/dlog q.

    The tail, the least likely tokens whose ascending cumulative mass is at most `parameter`, are all tokens with a logit
    below some y* and, of those with y* itself, the first ones. Four masses a pass cut the interval y* lies in to a
    quarter, until one distinct logit is left in it: five passes over the teacher's row where logits are bf16.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    exponent = inverse_temperature * LOG2_E
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    num_steps = tl.cdiv(V, BLOCK)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        student_row = student + row * student_stride
        teacher_row = teacher + row * teacher_stride
        m_s = tl.full((LANES,), LOWEST, tl.float32)
        total_s = tl.zeros((LANES,), tl.float32)
        moment_s = tl.zeros((LANES,), tl.float32)
        best = tl.zeros((LANES,), tl.int32)
        m_t, total_t, moment_t = m_s, total_s, moment_s
        for step in range(num_steps):
            _z, x, y = logits(
                student_row, teacher_row, step * BLOCK + offsets, V, K, teacher_ids,
                student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                True, PARTIAL, PAIRED,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            m_s, total_s, moment_s, best = take_in(x, step, exponent, m_s, total_s, moment_s, best)
            m_t, total_t, moment_t, best = take_in(y, step, exponent, m_t, total_t, moment_t, best)
        top_s, log_sum_s, _entropy = merge(exponent, m_s, total_s, moment_s)
        top_t, log_sum_t, _entropy = merge(exponent, m_t, total_t, moment_t)

        # All tokens below a probability of parameter / K are in the tail: together they have at most `parameter`.
        low = top_t + (log_sum_t + tl.log(parameter / K) - 0.01) / inverse_temperature
        high = top_t
        below = tl.full((), 0.0, tl.float32)  # the mass of the tokens up to low
        first, final = low, high  # the smallest and the largest logit in (low, high]
        while first < final:
            quarter = 0.25 * (high - low)
            cut_1, cut_2, cut_3 = low + quarter, low + 2.0 * quarter, low + 3.0 * quarter
            mass_0 = tl.zeros((LANES,), tl.float32)
            mass_1, mass_2, mass_3 = mass_0, mass_0, mass_0
            least = tl.full((LANES,), HUGE, tl.float32)
            most = tl.full((LANES,), -HUGE, tl.float32)
            for step in range(num_steps):
                _z, x, y = logits(
                    student_row, teacher_row, step * BLOCK + offsets, V, K, teacher_ids,
                    student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                    True, PARTIAL, PAIRED, False, False, False, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
                )  # fmt: skip
                p = exp2((y - top_t) * exponent - log_sum_t * LOG2_E)
                mass_0 += tl.sum(tl.where(y <= low, p, 0.0), 1)
                mass_1 += tl.sum(tl.where(y <= cut_1, p, 0.0), 1)
                mass_2 += tl.sum(tl.where(y <= cut_2, p, 0.0), 1)
                mass_3 += tl.sum(tl.where(y <= cut_3, p, 0.0), 1)
                least = tl.minimum(least, tl.min(tl.where(y > low, y, HUGE), 1))
                most = tl.maximum(most, tl.max(tl.where(y <= high, y, -HUGE), 1))
            first, final, below = tl.min(least, 0), tl.max(most, 0), tl.sum(mass_0, 0)
            if first < final:
                fits_1 = (tl.sum(mass_1, 0) <= parameter) & (cut_1 < high)
                fits_2 = (tl.sum(mass_2, 0) <= parameter) & (cut_2 < high)
                fits_3 = (tl.sum(mass_3, 0) <= parameter) & (cut_3 < high)
                low = tl.where(fits_3, cut_3, tl.where(fits_2, cut_2, tl.where(fits_1, cut_1, low)))
                high = tl.where(fits_3, high, tl.where(fits_2, cut_3, tl.where(fits_1, cut_2, cut_1)))

        # Of the tokens that share the logit y* = final, as many as still fit, in the order of their columns.
        each = exp2((final - top_t) * exponent - log_sum_t * LOG2_E)
        num_fitting = tl.minimum(tl.floor(tl.maximum(parameter - below, 0.0) / each), 1e9).to(tl.int32)
        gap_sum = tl.zeros((LANES,), tl.float32)
        tail_sum = tl.zeros((LANES,), tl.float32)
        reverse_kl = tl.zeros((LANES,), tl.float32)
        for step in range(num_steps):
            _z, x, y = logits(
                student_row, teacher_row, step * BLOCK + offsets, V, K, teacher_ids,
                student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                True, PARTIAL, PAIRED,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            d_s, d_t = (x - top_s) * exponent, (y - top_t) * exponent
            p, q = exp2(d_t - log_sum_t * LOG2_E), exp2(d_s - log_sum_s * LOG2_E)
            reverse_kl += tl.sum(q * ((d_s - d_t) * LN_2 - (log_sum_s - log_sum_t)), 1)
            ties = (y == final).to(tl.int32)
            rank = ties
            num_ties = tl.sum(tl.sum(ties, 1), 0)
            if (num_fitting > 0) & (num_ties > num_fitting):
                rank = tl.reshape(tl.cumsum(tl.reshape(ties, (BLOCK,)), 0), (LANES, WIDTH))
            gap = tl.abs(p - q)
            gap_sum += tl.sum(gap, 1)
            tail_sum += tl.sum(tl.where((y < final) | ((ties > 0) & (rank <= num_fitting)), gap, 0.0), 1)
            num_fitting -= num_ties
        whole = tl.sum(gap_sum, 0)
        # p = q leaves 0 / 0; both divergences are 0 there, so any share will do.
        share = tl.where(whole > 0.0, tl.sum(tail_sum, 0) / whole, 0.5)
        tl.store(row_parameters + row * 2, share)
        tl.store(row_parameters + row * 2 + 1, share * (1.0 + tl.sum(reverse_kl, 0)) - (1.0 - share))


@triton.jit
def _choose(m, steps, offsets, BLOCK: tl.constexpr):
    """Largest value of m and the first column that holds it, given each place's step."""
    top = tl.max(tl.max(m, 1), 0)
    columns = tl.where(m == top, steps * BLOCK + offsets, NO_COLUMN)
    return top, tl.min(tl.min(columns, 1), 0)


@triton.jit
def _put_next(m, steps, offsets, top, column, values, all_steps, BLOCK: tl.constexpr):
    """m and steps without (top, column): its place gets the next of its values, which lie a block apart."""
    place = column % BLOCK
    behind = (values < top) | ((values == top) & (all_steps * BLOCK + place > column))
    values = tl.where(behind, values, -HUGE)
    following = tl.max(values, 0)
    step = tl.min(tl.where(values == following, all_steps, NO_COLUMN), 0)
    return tl.where(offsets == place, following, m), tl.where(offsets == place, step, steps)


@triton.jit
def choice_kernel(
    student, student_stride, teacher, teacher_stride, teacher_ids, student_bias, teacher_bias,
    kd, choices, choice_gradients,
    num_rows, V, K, inverse_temperature, student_scale, student_softcap, teacher_scale, teacher_softcap,
    OF_CHOICES: tl.constexpr, TOP_K: tl.constexpr, CHOICES: tl.constexpr, STEPS: tl.constexpr,
    PARTIAL: tl.constexpr, PAIRED: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, STUDENT_SCALE: tl.constexpr, STUDENT_SOFTCAP: tl.constexpr,
    TEACHER_BIAS: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_SOFTCAP: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """choices, choice_gradients (C, 2 TOP_K): columns of the TOP_K likeliest tokens of the teacher, then of the student,
    and df/dlog q there; kd (C,), the divergence OF_CHOICES makes of them. Of equal tokens the first is the likelier.

    One pass keeps the maximum of every place of a block; when it is taken, only the columns of its place are read again.
    STEPS and CHOICES are powers of 2 not below the number of blocks and TOP_K.
    """
    BLOCK: tl.constexpr = LANES * WIDTH
    exponent = inverse_temperature * LOG2_E
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    num_steps = tl.cdiv(V, BLOCK)
    all_steps = tl.arange(0, STEPS)
    ranks = tl.arange(0, CHOICES)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        student_row = student + row * student_stride
        teacher_row = teacher + row * teacher_stride
        m_s = tl.full((LANES,), LOWEST, tl.float32)
        total_s = tl.zeros((LANES,), tl.float32)
        moment_s = tl.zeros((LANES,), tl.float32)
        best = tl.zeros((LANES,), tl.int32)
        m_t, total_t, moment_t = m_s, total_s, moment_s
        most_s = tl.full((LANES, WIDTH), -HUGE, tl.float32)
        steps_s = tl.zeros((LANES, WIDTH), tl.int32)
        most_t, steps_t = most_s, steps_s
        for step in range(num_steps):
            _z, x, y = logits(
                student_row, teacher_row, step * BLOCK + offsets, V, K, teacher_ids,
                student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                True, PARTIAL, PAIRED,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            m_s, total_s, moment_s, best = take_in(x, step, exponent, m_s, total_s, moment_s, best)
            m_t, total_t, moment_t, best = take_in(y, step, exponent, m_t, total_t, moment_t, best)
            steps_s, most_s = tl.where(x > most_s, step, steps_s), tl.maximum(most_s, x)
            steps_t, most_t = tl.where(y > most_t, step, steps_t), tl.maximum(most_t, y)
        top_s, log_sum_s, _entropy = merge(exponent, m_s, total_s, moment_s)
        top_t, log_sum_t, _entropy = merge(exponent, m_t, total_t, moment_t)

        columns_t = tl.full((CHOICES,), 0, tl.int32)
        columns_s = tl.full((CHOICES,), 0, tl.int32)
        for rank in range(TOP_K):
            top, column = _choose(most_t, steps_t, offsets, BLOCK)
            columns_t = tl.where(ranks == rank, column, columns_t)
            places = tl.where(all_steps < num_steps, all_steps * BLOCK, 0) + column % BLOCK
            _z, x, y = logits(
                student_row, teacher_row, places, V, K, teacher_ids,
                student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                True, PARTIAL, PAIRED, False, False, False, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
            )  # fmt: skip
            y = tl.where(all_steps < num_steps, y, -HUGE)
            most_t, steps_t = _put_next(most_t, steps_t, offsets, top, column, y, all_steps, BLOCK)

            top, column = _choose(most_s, steps_s, offsets, BLOCK)
            columns_s = tl.where(ranks == rank, column, columns_s)
            places = tl.where(all_steps < num_steps, all_steps * BLOCK, 0) + column % BLOCK
            _z, x, y = logits(
                student_row, teacher_row, places, V, K, teacher_ids,
                student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
                False, PARTIAL, PAIRED,
                STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, False, False, False,
            )  # fmt: skip
            x = tl.where(all_steps < num_steps, x, -HUGE)
            most_s, steps_s = _put_next(most_s, steps_s, offsets, top, column, x, all_steps, BLOCK)

        _z, x, y = logits(
            student_row, teacher_row, columns_t, V, K, teacher_ids,
            student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
            True, PARTIAL, PAIRED,
            STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
        )  # fmt: skip
        log_p_t = (y - top_t) * exponent * LN_2 - log_sum_t
        log_q_t = (x - top_s) * exponent * LN_2 - log_sum_s
        _z, x, y = logits(
            student_row, teacher_row, columns_s, V, K, teacher_ids,
            student_bias, student_scale, student_softcap, teacher_bias, teacher_scale, teacher_softcap,
            True, PARTIAL, PAIRED,
            STUDENT_BIAS, STUDENT_SCALE, STUDENT_SOFTCAP, TEACHER_BIAS, TEACHER_SCALE, TEACHER_SOFTCAP,
        )  # fmt: skip
        log_p_s = (y - top_t) * exponent * LN_2 - log_sum_t
        log_q_s = (x - top_s) * exponent * LN_2 - log_sum_s
        loss, g_t, g_s = OF_CHOICES(log_p_t, log_q_t, log_p_s, log_q_s, ranks, TOP_K)
        tl.store(kd + row, loss)
        of_row = row * 2 * TOP_K + ranks
        tl.store(choices + of_row, columns_t, mask=ranks < TOP_K)
        tl.store(choices + of_row + TOP_K, columns_s, mask=ranks < TOP_K)
        tl.store(choice_gradients + of_row, g_t, mask=ranks < TOP_K)
        tl.store(choice_gradients + of_row + TOP_K, g_s, mask=ranks < TOP_K)
