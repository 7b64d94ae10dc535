"""Triton twins of the divergences: what the kernels call for every (row, token), or for every row's first choices.

A pointwise twin takes (log_p, log_q, p, q, parameter) and returns (f, df/dlog q), elementwise in fp32; see
``Divergence.pointwise``. p is the teacher, q the student; where a token is not compared both are 0 and their logarithms
large negative numbers.

A twin of the first choices takes (log_p_t, log_q_t, log_p_s, log_q_s, ranks, TOP_K), the log-probabilities of the
teacher's and the student's TOP_K likeliest tokens, ranks being arange(0, a power of 2): what lies beyond TOP_K is to be
left out. It returns (loss, df/dlog q of the teacher's choices, of the student's).
"""

import triton
import triton.language as tl

from kdflow_kernels import divergences
from kdflow_kernels.divergences import Divergence, JITChoices, JITPointwise
from kdflow_kernels.jit_math import LOG2_E, exp2, log
from kdflow_kernels.statistics_kernels import tail_share_kernel

MOST_CHOICES = 32
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal fp32


@triton.jit
def _log_mixture(share, a, b):
    """log(share a + (1 - share) b)."""
    return log(tl.maximum(share * a + (1.0 - share) * b, TINY, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _share(weight, a, other_weight, b):
    """weight a / (weight a + other_weight b), 0 where both vanish."""
    part = weight * a
    return part / tl.maximum(part + other_weight * b, TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def forward_kl(log_p, log_q, p, q, parameter):
    return p * (log_p - log_q), -p


@triton.jit
def reverse_kl(log_p, log_q, p, q, parameter):
    f = q * (log_q - log_p)
    return f, f + q


@triton.jit
def jsd(log_p, log_q, p, q, parameter):
    log_m = _log_mixture(parameter, p, q)
    g = (1.0 - parameter) * q * (log_q - log_m)
    return parameter * p * (log_p - log_m) + g, g


@triton.jit
def skewed_forward_kl(log_p, log_q, p, q, parameter):
    f = p * (log_p - _log_mixture(parameter, p, q))
    return f, -p * _share(1.0 - parameter, q, parameter, p)


@triton.jit
def skewed_reverse_kl(log_p, log_q, p, q, parameter):
    f = q * (log_q - _log_mixture(parameter, q, p))
    return f, f + q * _share(1.0 - parameter, p, parameter, q)


@triton.jit
def tvd(log_p, log_q, p, q, parameter):
    difference = q - p
    sign = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, 0.0))
    return 0.5 * tl.abs(difference), 0.5 * sign * q


@triton.jit
def jeffreys(log_p, log_q, p, q, parameter):
    p_minus_q, log_ratio = p - q, log_p - log_q
    return p_minus_q * log_ratio, -(q * log_ratio + p_minus_q)


@triton.jit
def adaptive_kl(log_p, log_q, p, q, parameter):
    """parameter: the row's share of the tail."""
    log_ratio = log_p - log_q
    forward, reverse = (1.0 - parameter) * p, parameter * q
    return (forward - reverse) * log_ratio, reverse * (1.0 - log_ratio) - forward


@triton.jit
def top1_ce(log_p_t, log_q_t, log_p_s, log_q_s, ranks, TOP_K: tl.constexpr):
    p = tl.where(ranks == 0, exp2(log_p_t * LOG2_E), 0.0)
    return tl.sum(-p * log_q_t, 0), -p, tl.zeros_like(p)


@triton.jit
def hierarchical_ranking(log_p_t, log_q_t, log_p_s, log_q_s, ranks, TOP_K: tl.constexpr):
    counted = ranks < TOP_K
    p_t, q_t, p_s, q_s = exp2(log_p_t * LOG2_E), exp2(log_q_t * LOG2_E), exp2(log_p_s * LOG2_E), exp2(log_q_s * LOG2_E)
    lead = q_t - tl.sum(tl.where(ranks == 0, q_t, 0.0), 0)
    leads = (lead >= 0.0) & counted
    passing = q_s[None, :] - q_t[:, None]
    passes = (passing >= 0.0) & (p_t[:, None] > p_s[None, :]) & counted[:, None] & counted[None, :]
    loss = tl.sum(tl.where(leads, lead, 0.0), 0) + tl.sum(tl.sum(tl.where(passes, passing, 0.0), 1), 0)
    loss += 0.0 * tl.sum(p_t + q_t + p_s + q_s, 0)  # no comparison hides a NaN
    ahead = tl.where(leads, 1.0, 0.0)
    passed = tl.where(passes, 1.0, 0.0)
    of_teacher = ahead - tl.where(ranks == 0, tl.sum(ahead, 0), 0.0) - tl.sum(passed, 1)
    return loss, of_teacher * q_t, tl.sum(passed, 0) * q_s


# sum p is 1 in every row, so forward KL's gradient needs no pass of its own to learn its sum.
FORWARD_KL = JITPointwise(forward_kl, gradient_sum=-1.0)


def twin(divergence: Divergence) -> JITPointwise | JITChoices | None:
    """The Triton form of one of this package's divergences; None: it has none."""
    if not divergences.is_shipped(divergence):
        return None
    match divergence:
        case divergences.ForwardKL() | divergences.JSD(beta=0.0):
            return FORWARD_KL
        case divergences.ReverseKL() | divergences.JSD(beta=1.0):
            return JITPointwise(reverse_kl)
        case divergences.JSD(beta=beta):
            return JITPointwise(jsd, beta)
        case divergences.SkewedForwardKL(alpha=alpha):
            return JITPointwise(skewed_forward_kl, alpha)
        case divergences.SkewedReverseKL(alpha=alpha):
            return JITPointwise(skewed_reverse_kl, alpha)
        case divergences.TVD():
            return JITPointwise(tvd)
        case divergences.Jeffreys():
            return JITPointwise(jeffreys)
        case divergences.AdaptiveKL(alpha=alpha):
            return JITPointwise(adaptive_kl, alpha, row_parameters=tail_share_kernel)
        case divergences.Top1CE():
            return JITChoices(top1_ce, 1)
        # What the choices cost grows with their number; beyond these torch's own top-k is no worse.
        case divergences.HierarchicalRanking(top_k=top_k) if top_k <= MOST_CHOICES:
            return JITChoices(hierarchical_ranking, top_k)
        case _:
            return None
