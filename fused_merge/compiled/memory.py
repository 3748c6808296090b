"""Elements of tensors, found by their address, as fp32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from fused_merge.compiled.jit import inlined, loop
from fused_merge.compiled.layout import DTYPE

# Elements that are stepped at once. A power of two: their sum is a node of `fused_merge.eager.sums`.
BLOCK = 4096

FP32, BF16, FP16, INT16 = range(4)
DTYPES = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16, torch.int16: INT16}
_QUIET_NAN = np.uint16(0x7FC0)


# --- what numba has no word for


@intrinsic
def lowest_bit(typing_context: Any, word: Any) -> Any:
    """The number of the lowest one bit of a word that has one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def fetch_add(typing_context: Any, address: Any, value: Any) -> Any:
    """Add to the 64-bit integer at an address, which other threads add to, and return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


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


def _half(result: Any, x: Any, source: Any, target: Any, operation: str) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        converted = getattr(builder, operation)(builder.bitcast(arguments[0], source), target)
        return builder.bitcast(converted, context.get_value_type(result))

    return result(x), generate


@intrinsic
def from_half(typing_context: Any, bits: Any) -> Any:
    """The fp32 number of an fp16 pattern."""
    return _half(types.float32, types.uint16, ir.HalfType(), ir.FloatType(), "fpext")


@intrinsic
def to_half(typing_context: Any, x: Any) -> Any:
    """The pattern of the nearest fp16 number."""
    return _half(types.uint16, types.float32, ir.FloatType(), ir.HalfType(), "fptrunc")


# --- where elements lie


def _view(dtype: Any) -> Any:
    """Return what makes an array of `count` elements of an address; nobody counts who uses it."""
    array = types.Array(dtype, 1, "C")

    @intrinsic
    def view(typing_context: Any, address: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            made = context.make_array(array)(context, builder)
            size = context.get_constant(types.intp, dtype.bitwidth // 8)
            data = builder.inttoptr(arguments[0], context.get_data_type(dtype).as_pointer())
            populate_array(made, data=data, shape=[arguments[1]], strides=[size], itemsize=size, meminfo=None)
            return made._getvalue()

        return array(types.int64, types.int64), generate

    return view


fp32, int16, int32, int64 = map(_view, (types.float32, types.int16, types.int32, types.int64))
uint8, uint16, uint32 = map(_view, (types.uint8, types.uint16, types.uint32))


# --- dtypes


@inlined
def nearest_bf16(bits):
    """The pattern of the bf16 number that is nearest to an fp32 one."""
    rounded = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))
    return _QUIET_NAN if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else rounded


@inlined
def from_bf16(bits):
    """The fp32 number of a bf16 pattern."""
    return as_float(np.uint32(np.uint32(bits) << np.uint32(16)))


@loop
def widen_bf16(source: int, out: int, count: int) -> None:
    """Write bf16 patterns as fp32 numbers."""
    x, y = uint16(source, count), uint32(out, count)
    for j in range(count):
        y[j] = np.uint32(x[j]) << np.uint32(16)


@loop
def widen_fp16(source: int, out: int, count: int) -> None:
    """Write fp16 patterns as fp32 numbers."""
    x, y = uint16(source, count), fp32(out, count)
    for j in range(count):
        y[j] = from_half(x[j])


@loop
def round_bf16(source: int, out: int, count: int) -> None:
    """Write fp32 numbers as bf16 patterns."""
    x, y = uint32(source, count), uint16(out, count)
    for j in range(count):
        y[j] = nearest_bf16(x[j])


@loop
def round_fp16(source: int, out: int, count: int) -> None:
    """Write fp32 numbers as fp16 patterns."""
    x, y = fp32(source, count), uint16(out, count)
    for j in range(count):
        y[j] = to_half(x[j])


@loop
def copy(source: int, out: int, count: int) -> None:
    """Write words of four bytes."""
    x, y = uint32(source, count), uint32(out, count)
    for j in range(count):
        y[j] = x[j]


@inlined
def widen(dtype, source, out, count):
    """Write elements of a 16-bit dtype as fp32 numbers."""
    if dtype == BF16:
        widen_bf16(source, out, count)
    else:
        widen_fp16(source, out, count)


@inlined
def round_to(dtype, source, out, count):
    """Write fp32 numbers as elements of a dtype, each rounded once."""
    if dtype == FP32:
        copy(source, out, count)
    elif dtype == BF16:
        round_bf16(source, out, count)
    else:
        round_fp16(source, out, count)


@inlined
def load_from(address, dtype, base, count, room):
    """Return where elements of a tensor lie as fp32: there, or in a room that they are widened into."""
    if dtype == FP32:
        return address + 4 * base
    widen(dtype, address + 2 * base, room, count)
    return room


@inlined
def load(t, column, base, count, room):
    """Do what `load_from` does, for an address and a dtype of the table of a step."""
    return load_from(t[column], t[column + DTYPE], base, count, room)


@inlined
def store(t, column, base, count, x):
    """Write fp32 numbers, each rounded once; nothing where they were changed in the tensor itself."""
    dtype, address = t[column + DTYPE], t[column]
    out = address + (4 if dtype == FP32 else 2) * base
    if out != x:
        round_to(dtype, x, out, count)


@inlined
def load_one(address, dtype, i):
    """Return element i."""
    if dtype == FP32:
        return fp32(address + 4 * i, 1)[0]
    bits = uint16(address + 2 * i, 1)[0]
    return from_bf16(bits) if dtype == BF16 else from_half(bits)
