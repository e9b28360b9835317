"""GELU and its slope for the other kernels, in float32 registers.

Multiply-adds are written out (``tl.fma``): whether Triton joins a product and a sum by itself depends on its version.
"""

# mypy: allow-incomplete-defs, allow-untyped-calls
# (in kernels only the constants have types)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def upper_tail(x, EXACT: tl.constexpr):
    """Q(|x|), the standard normal's probability above ``|x|``.

    ``EXACT`` takes the library's error function, some 22 instructions. Otherwise Q is 2 to the power of a polynomial
    that minimises the largest relative error over |x| <= 5.75, 3.3e-6: far below what bfloat16 and float16 resolve, at
    less than half of the instructions. Beyond that Q is below 4.5e-9 and the polynomial only falls.
    """
    a = tl.abs(x)
    if EXACT:
        return 0.5 - 0.5 * tl.erf(a * 0.7071067811865476)
    p = tl.fma(a, -1.8254792107026756e-06, 6.14398299976851e-05)
    p = tl.fma(p, a, -0.0009294875867068846)
    p = tl.fma(p, a, 0.008504599076607146)
    p = tl.fma(p, a, -0.05395484985479686)
    p = tl.fma(p, a, -0.4584682052418709)
    p = tl.fma(p, a, -1.1512500433188733)
    p = tl.fma(p, a, -0.9999953352899187)
    return tl.exp2(p)


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """x * Phi(x) as max(x, 0) - |x| * Q(|x|). NaN stays NaN, and so does infinity become NaN."""
    return tl.fma(-tl.abs(x), upper_tail(x, EXACT), tl.maximum(x, 0.0))


@triton.jit
def gelu_slope(x, EXACT: tl.constexpr):
    """The derivative, Phi(x) + x * phi(x)."""
    q = upper_tail(x, EXACT)
    density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
    return tl.fma(x, density, tl.where(x > 0, 1.0 - q, q))
