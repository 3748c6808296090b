"""From the fp32 result of a step to what is stored, as `fused_merge.eager.rounding` says."""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import memory
from fused_merge.compiled.arithmetic import ZERO
from fused_merge.compiled.jit import inlined, jit
from fused_merge.compiled.memory import BF16, FP32, as_bits, as_float

_SIGN, _MAGNITUDE, _INFINITY = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
_HALF_UNIT, _SIXTEEN, _LOW16 = np.uint32(0x8000), np.uint32(16), np.uint32(0xFFFF)
_QUIET_NAN = np.uint32(0x7FC00000)


@inlined
def _is_finite(bits):
    return (bits & _MAGNITUDE) < _INFINITY


@inlined
def two_sum_error(a, b, s):
    """The exact error a + b - s of the rounded sum s."""
    shadow = s - a
    return (a - (s - shadow)) + (b - shadow)


@inlined
def _neighbor(x, error):
    """The fp32 number next to x on the side of an error that is not 0."""
    bits = as_bits(x)
    if x == ZERO:
        return as_float(np.uint32(np.uint32(1) | (as_bits(error) & _SIGN)))
    away = (error > ZERO) == (x > ZERO)
    return as_float(np.uint32(bits + 1) if away else np.uint32(bits - 1))


@inlined
def stochastic_fp32(x, error, random):
    """x, or its neighbor with the probability of the distance."""
    if error == ZERO or error != error or not _is_finite(as_bits(x)):
        return x
    neighbor = _neighbor(x, error)
    gap = abs(neighbor - x)
    return neighbor if np.float32(random & _LOW16) < np.float32(65536) * abs(error / gap) else x


@inlined
def stochastic_bf16(x, random):
    """x as the pattern of a bf16 number, up or down."""
    bits = as_bits(x)
    if not _is_finite(bits):
        return memory.nearest_bf16(bits)
    return np.uint16(np.uint32(bits + (random & _LOW16)) >> _SIXTEEN)


@inlined
def stochastic_fp16(x, random):
    """x as the pattern of an fp16 number, up or down."""
    nearest = memory.to_half(x)
    back = memory.from_half(nearest)
    error = x - back
    if error == ZERO or error != error or not _is_finite(as_bits(x)):
        return nearest
    if back == ZERO:
        pattern = np.uint16(1) | np.uint16((as_bits(error) & _SIGN) >> _SIXTEEN)
    else:
        away = (error > ZERO) == (back > ZERO)
        pattern = np.uint16(nearest + np.uint16(1)) if away else np.uint16(nearest - np.uint16(1))
    gap = abs(memory.from_half(pattern) - back)
    return pattern if np.float32(random & _LOW16) < np.float32(65536) * abs(error / gap) else nearest


@jit
def store_stochastic_one(address, dtype, i, start, merged, theta, random):
    """Write element i, start + merged = theta and its error, rounded up or down."""
    if dtype == FP32:
        memory.floats(address + 4 * i, 1)[0] = stochastic_fp32(theta, two_sum_error(start, merged, theta), random)
    elif dtype == BF16:
        memory.halves(address + 2 * i, 1)[0] = stochastic_bf16(theta, random)
    else:
        memory.halves(address + 2 * i, 1)[0] = stochastic_fp16(theta, random)


@jit
def store_stochastic(address, dtype, base, start, merged, theta, random):
    """Write elements from number `base` on, each rounded up or down."""
    if dtype == FP32:
        out = memory.floats(address + 4 * base, len(theta))
        for j in range(len(theta)):
            out[j] = stochastic_fp32(theta[j], two_sum_error(start[j], merged[j], theta[j]), random[j])
    elif dtype == BF16:
        bits = memory.halves(address + 2 * base, len(theta))
        for j in range(len(theta)):
            bits[j] = stochastic_bf16(theta[j], random[j])
    else:
        bits = memory.halves(address + 2 * base, len(theta))
        for j in range(len(theta)):
            bits[j] = stochastic_fp16(theta[j], random[j])


@jit
def split(x, high, low):
    """fp32 numbers as the patterns of bf16 weights and the int16 that restore them."""
    bits = x.view(np.uint32)
    for j in range(len(x)):
        whole = _QUIET_NAN if (bits[j] & _MAGNITUDE) > _INFINITY else bits[j]
        # The sum is one of signed numbers, whose shift keeps the sign.
        upper = np.uint32(np.int32(np.uint32(whole + _HALF_UNIT)) >> np.int32(16))
        high[j] = np.uint16(upper)
        low[j] = np.uint16(np.uint32(whole - (upper << _SIXTEEN)))


@jit
def join(high, low, out):
    """The fp32 numbers that `split` took apart; the weight alone where they do not belong together."""
    for j in range(len(out)):
        weight = np.uint32(np.uint32(high[j]) << _SIXTEEN)
        whole = np.uint32(weight + np.uint32(np.int32(np.int16(low[j]))))
        out[j] = as_float(weight if (whole & _MAGNITUDE) > _INFINITY else whole)


@jit
def with_master(param, master, rounded, out):
    """The fp32 master where the weight is what it rounds to, else the weight."""
    for j in range(len(out)):
        out[j] = master[j] if rounded[j] == param[j] else param[j]
