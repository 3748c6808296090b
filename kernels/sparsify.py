"""F on loaded values; the equations of `fused_merge/eager/sparsify.py`.

A new F that compares with the k-th largest magnitude is a function, a name in `RANKED` and a line of `by_rank`.
"""

from __future__ import annotations

import triton
import triton.language as tl

RANKED = ("magnitude", "soft_threshold")


@triton.jit
def pattern(x):
    """Magnitudes as integers: finite values in their order, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def random(x, bits, threshold):
    """`eager.sparsify.random`: keep what its random bits say."""
    return tl.where(bits < threshold, x, 0.0)


@triton.jit
def magnitude(x, kth):
    """`eager.sparsify.magnitude`: keep what is at least the k-th largest |x|, given as a pattern."""
    return tl.where(pattern(x) >= kth, x, 0.0)


@triton.jit
def soft_threshold(x, kth):
    """`eager.sparsify.soft_threshold`: shrink every |x| by the k-th largest, given as a pattern."""
    threshold = kth.to(tl.float32, bitcast=True)
    shrunk = tl.where(tl.abs(x) > threshold, x - tl.where(x < 0, -threshold, threshold), 0.0)
    return tl.where(x == x, shrunk, x)


@triton.jit
def by_rank(x, kth, SPARSIFY: tl.constexpr):
    """F(x) for the F that compare with the k-th largest magnitude."""
    if SPARSIFY == "magnitude":
        return magnitude(x, kth)
    else:
        tl.static_assert(SPARSIFY == "soft_threshold")
        return soft_threshold(x, kth)
