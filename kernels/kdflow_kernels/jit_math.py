"""Exponential and logarithm for the kernels: one instruction of the special-function unit each.

ex2.approx is good to 2 units in the last place; lg2.approx to 2^-22, absolute for arguments from 1/2 to 2 and relative
elsewhere. Results below fp32's normal numbers are 0. Triton's own add instructions for those, and compute log in some
twenty.
"""

import os

import triton
import triton.language as tl

INTERPRETING = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x):
    if INTERPRETING:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def log(x):
    if INTERPRETING:
        return tl.log(x)
    y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return y * LN_2
