"""From the fp32 result of a step to what is stored, as `fused_merge.eager.rounding` says."""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import memory
from fused_merge.compiled.arithmetic import ZERO
from fused_merge.compiled.jit import inlined, loop
from fused_merge.compiled.memory import BF16, FP32, as_bits, as_float, fp32, int16, uint16, uint32

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


@inlined
def store_one(address, dtype, i, start, merged, theta, random):
    """Write element i, start + merged = theta and its error, rounded up or down."""
    if dtype == FP32:
        fp32(address + 4 * i, 1)[0] = stochastic_fp32(theta, two_sum_error(start, merged, theta), random)
    else:
        bits = stochastic_bf16(theta, random) if dtype == BF16 else stochastic_fp16(theta, random)
        uint16(address + 2 * i, 1)[0] = bits


@loop
def store_stochastic(address: int, dtype: int, start: int, merged: int, theta: int, random: int, count: int) -> None:
    """Write elements, each rounded up or down."""
    x, y, total, words = fp32(start, count), fp32(merged, count), fp32(theta, count), uint32(random, count)
    if dtype == FP32:
        out = fp32(address, count)
        for j in range(count):
            out[j] = stochastic_fp32(total[j], two_sum_error(x[j], y[j], total[j]), words[j])
    elif dtype == BF16:
        bits = uint16(address, count)
        for j in range(count):
            bits[j] = stochastic_bf16(total[j], words[j])
    else:
        bits = uint16(address, count)
        for j in range(count):
            bits[j] = stochastic_fp16(total[j], words[j])


@loop
def split(source: int, high: int, low: int, count: int) -> None:
    """fp32 numbers as the patterns of bf16 weights and the int16 that restore them."""
    bits, upper, lower = uint32(source, count), uint16(high, count), uint16(low, count)
    for j in range(count):
        whole = _QUIET_NAN if (bits[j] & _MAGNITUDE) > _INFINITY else bits[j]
        # The sum is a signed number, whose shift keeps the sign.
        weight = np.uint32(np.int32(np.uint32(whole + _HALF_UNIT)) >> np.int32(16))
        upper[j] = np.uint16(weight)
        lower[j] = np.uint16(np.uint32(whole - (weight << _SIXTEEN)))


@loop
def join(high: int, low: int, out: int, count: int) -> None:
    """The fp32 numbers that `split` took apart; the weight alone where they do not belong together."""
    upper, lower, x = uint16(high, count), int16(low, count), fp32(out, count)
    for j in range(count):
        weight = np.uint32(np.uint32(upper[j]) << _SIXTEEN)
        whole = np.uint32(weight + np.uint32(np.int32(lower[j])))
        x[j] = as_float(weight if (whole & _MAGNITUDE) > _INFINITY else whole)


@loop
def with_master(param: int, master: int, rounded: int, out: int, count: int) -> None:
    """The fp32 master where the weight is what it rounds to, else the weight."""
    x, y, z, weight = fp32(param, count), fp32(master, count), fp32(rounded, count), fp32(out, count)
    for j in range(count):
        weight[j] = y[j] if z[j] == x[j] else x[j]
