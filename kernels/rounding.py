"""From the fp32 result of a step to what is stored; the equations of `fused_merge/eager/rounding.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even. The interpreter would truncate to bf16, so there it is done on bits."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def is_finite(x):
    """Whether fp32 numbers are neither infinite nor NaN."""
    return (x.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def two_sum_error(a, b):
    """What the rounded sum s = a + b lacks, exactly: the second result of `eager.rounding.two_sum`."""
    s = a + b
    shadow = s - a
    return (a - (s - shadow)) + (b - shadow)


@triton.jit
def stochastic(x, error, bits, dtype: tl.constexpr):
    """`eager.rounding.stochastic`: x + error (fp32) to `dtype` with the low 16 bits of the elements' random bits."""
    random = (bits & 0xFFFF).to(tl.int32)
    if dtype == tl.bfloat16:
        cut = ((x.to(tl.int32, bitcast=True) + random) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.where(is_finite(x), cut, nearest(x, dtype))
    else:
        rounded = x.to(dtype)
        if dtype == tl.float32:
            pattern = rounded.to(tl.int32, bitcast=True)
        else:
            error = x - rounded.to(tl.float32)
            pattern = rounded.to(tl.int16, bitcast=True)
        # One pattern up is one step away from zero; from zero itself the step has the sign of the error.
        away = ((error > 0) == (rounded > 0)).to(pattern.dtype)
        neighbor = (pattern + 2 * away - 1).to(pattern.dtype).to(dtype, bitcast=True)
        one = tl.full(pattern.shape, 1, pattern.dtype).to(dtype, bitcast=True)
        neighbor = tl.where(rounded == 0, tl.where(error < 0, -one, one), neighbor)
        gap = tl.abs(neighbor.to(tl.float32) - rounded.to(tl.float32))
        moves = (random.to(tl.float32) < 65536 * tl.abs(tl.div_rn(error, gap))) & (error != 0) & is_finite(x)
        return tl.where(moves, neighbor, rounded)


@triton.jit
def split(x):
    """`eager.rounding.split`: fp32 as a bf16 weight and the int16 that restores it."""
    bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
    high = (bits + 0x8000) >> 16
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), (bits - (high << 16)).to(tl.int16)


@triton.jit
def join(weight, low):
    """`eager.rounding.join`: the fp32 that `split` took apart; the weight alone where the two no longer belong."""
    whole = ((weight.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    return tl.where(whole == whole, whole, weight.to(tl.float32))
