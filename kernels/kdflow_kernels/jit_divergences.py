"""Triton twins of the pointwise divergences: what the row kernel calls for every (row, token).

A twin takes (log_p, log_q, p, q, parameter) and returns (f, df/dlog q), elementwise in fp32; see
``Divergence.pointwise``. p is the teacher, q the student; where a token is not compared both are 0 and their logarithms
large negative numbers.
"""

import triton
import triton.language as tl

from kdflow_kernels import divergences
from kdflow_kernels.divergences import Divergence, JITPointwise
from kdflow_kernels.jit_math import log

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


# sum p is 1 in every row, so forward KL's gradient needs no pass of its own to learn its sum.
FORWARD_KL = JITPointwise(forward_kl, gradient_sum=-1.0)


def twin(divergence: Divergence) -> JITPointwise | None:
    """The Triton form of one of this package's divergences; None: it has none."""
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
        case _:
            return None
