"""Elements of tensors, found by their address, as fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from fused_merge.compiled.jit import inlined, jit

# Elements that are stepped at once. A power of two: their sum is a node of `fused_merge.eager.sums`.
BLOCK = 4096

FP32, BF16, FP16, INT16 = range(4)
DTYPES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16, torch.int16: INT16}
_QUIET_NAN = np.uint16(0x7FC0)


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """The pointer that an integer stands for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Ask for the cache line of an address, which will be written, and go on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", (byte,), kind)
        # To write, to be kept in all caches, data.
        options = [ir.Constant(number, x) for x in (1, 3, 1)]
        builder.call(function, [builder.inttoptr(arguments[0], byte), *options])
        return context.get_dummy_value()

    return types.void(types.int64), generate


def _half(typing_context: Any, x: Any, result: Any, source: Any, target: Any, operation: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        half = builder.bitcast(arguments[0], source)
        return builder.bitcast(getattr(builder, operation)(half, target), context.get_value_type(result))

    return result(x), generate


def _bitcast(result: Any, source: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(result))

    return result(source), generate


@intrinsic
def as_bits(typing_context: Any, x: Any) -> Any:
    """The pattern of an fp32 number."""
    return _bitcast(types.uint32, types.float32)


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """The fp32 number of a pattern."""
    return _bitcast(types.float32, types.uint32)


@intrinsic
def from_half(typing_context: Any, bits: Any) -> Any:
    """The fp32 number of an fp16 pattern."""
    return _half(typing_context, types.uint16, types.float32, ir.HalfType(), ir.FloatType(), "fpext")


@intrinsic
def to_half(typing_context: Any, x: Any) -> Any:
    """The pattern of the nearest fp16 number."""
    return _half(typing_context, types.float32, types.uint16, ir.FloatType(), ir.HalfType(), "fptrunc")


@jit
def floats(address, count):
    """Fp32 elements where they lie."""
    return carray(_pointer(address), (count,), np.float32)


@jit
def halves(address, count):
    """Patterns of 16 bits where they lie."""
    return carray(_pointer(address), (count,), np.uint16)


@jit
def words(address, count):
    """Int32 words where they lie."""
    return carray(_pointer(address), (count,), np.int32)


@jit
def longs(address, count):
    """Int64 numbers where they lie."""
    return carray(_pointer(address), (count,), np.int64)


@jit
def _widen_bf16(source, out):
    wide = out.view(np.uint32)
    for j in range(len(source)):
        wide[j] = np.uint32(source[j]) << np.uint32(16)


@jit
def _widen_fp16(source, out):
    for j in range(len(source)):
        out[j] = from_half(source[j])


@inlined
def nearest_bf16(bits):
    """The pattern of the bf16 number that is nearest to an fp32 one."""
    rounded = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return _QUIET_NAN if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded


@jit
def _round_bf16(x, out):
    bits = x.view(np.uint32)
    for j in range(len(x)):
        out[j] = nearest_bf16(bits[j])


@jit
def _round_fp16(x, out):
    for j in range(len(x)):
        out[j] = to_half(x[j])


@jit
def load(address, dtype, base, count, room):
    """Return `count` elements from number `base` on: where they lie if they are fp32, else widened into `room`."""
    if dtype == FP32:
        return floats(address + 4 * base, count)
    out = room[:count]
    source = halves(address + 2 * base, count)
    if dtype == BF16:
        _widen_bf16(source, out)
    else:
        _widen_fp16(source, out)
    return out


@jit
def store(address, dtype, base, x):
    """Write elements from number `base` on, each rounded once; nothing where `x` is where they lie."""
    if dtype == BF16:
        _round_bf16(x, halves(address + 2 * base, len(x)))
    elif dtype == FP16:
        _round_fp16(x, halves(address + 2 * base, len(x)))


@jit
def load_one(address, dtype, i):
    """Return element i."""
    if dtype == FP32:
        return floats(address + 4 * i, 1)[0]
    bits = halves(address + 2 * i, 1)[0]
    if dtype == BF16:
        pair = np.uint32(bits) << np.uint32(16)
        return as_float(pair)
    return from_half(bits)


@jit
def store_one(address, dtype, i, x):
    """Write element i, rounded once."""
    if dtype == FP32:
        floats(address + 4 * i, 1)[0] = x
    elif dtype == BF16:
        halves(address + 2 * i, 1)[0] = nearest_bf16(as_bits(x))
    else:
        halves(address + 2 * i, 1)[0] = to_half(x)


@jit
def store_all(address, dtype, base, x):
    """Write elements from number `base` on, each rounded once."""
    if dtype == FP32:
        floats(address + 4 * base, len(x))[:] = x
    else:
        store(address, dtype, base, x)


@jit
def nearest(x, dtype, room, out):
    """Write fp32 numbers rounded to a dtype of 16 bits, as fp32."""
    bits = room[: len(x)]
    if dtype == BF16:
        _round_bf16(x, bits)
        _widen_bf16(bits, out)
    else:
        _round_fp16(x, bits)
        _widen_fp16(bits, out)
