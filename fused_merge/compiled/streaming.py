"""Whole cache lines written past the caches, which would first read what they are to hold."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fused_merge.compiled.jit import inlined, loop
from fused_merge.compiled.memory import BF16, FP16, FP32, uint8

# Bytes of a cache line.
LINE = 64


def _store(builder: Any, line: Any, address: Any) -> None:
    """Write a vector as the cache line that begins at an address."""
    written = builder.store(line, builder.inttoptr(address, line.type.as_pointer()), align=LINE)
    written.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))


@intrinsic
def _copy_line(typing_context: Any, source: Any, out: Any) -> Any:
    """Copy a cache line."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        line = ir.VectorType(ir.IntType(32), LINE // 4)
        _store(builder, builder.load(builder.inttoptr(arguments[0], line.as_pointer()), align=1), arguments[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def _line_along(typing_context: Any, end: Any, a: Any, b: Any, weight: Any, out: Any, dtype: Any) -> Any:
    """Write a cache line of end + weight*(b - a), rounded once; of the same bits as the loops of `interpolate`."""
    kind = dtype.literal_value
    count = LINE // (4 if kind == FP32 else 2)
    numbers, words = ir.VectorType(ir.FloatType(), count), ir.VectorType(ir.IntType(32), count)
    halves = ir.VectorType(ir.IntType(16), count)
    stored = {FP32: numbers, BF16: halves, FP16: ir.VectorType(ir.HalfType(), count)}[kind]

    def every(value: int) -> Any:
        return ir.Constant(words, [value] * count)

    def load(builder: Any, address: Any) -> Any:
        size = 4 if kind == FP32 else 2
        x = builder.load(builder.inttoptr(address, stored.as_pointer()), align=size)
        if kind == BF16:
            return builder.bitcast(builder.shl(builder.zext(x, words), every(16)), numbers)
        return builder.fpext(x, numbers) if kind == FP16 else x

    def to_bf16(builder: Any, x: Any) -> Any:
        bits = builder.bitcast(x, words)
        odd = builder.icmp_unsigned("!=", builder.and_(bits, every(1 << 16)), every(0))
        rounded = builder.add(bits, builder.select(odd, every(0x8000), every(0x7FFF)))
        pairs = builder.bitcast(rounded, ir.VectorType(ir.IntType(16), 2 * count))
        upper = ir.Constant(words, [2 * k + 1 for k in range(count)])
        upper = builder.shuffle_vector(pairs, ir.Constant(pairs.type, ir.Undefined), upper)
        return builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(halves, [0x7FC0] * count), upper)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, x, y = (load(builder, address) for address in arguments[:3])
        undefined = ir.Constant(numbers, ir.Undefined)
        first = builder.insert_element(undefined, arguments[3], ir.Constant(ir.IntType(32), 0))
        weights = builder.shuffle_vector(first, undefined, every(0))
        point = builder.fadd(start, builder.fmul(weights, builder.fsub(y, x)))
        if kind == BF16:
            point = to_bf16(builder, point)
        elif kind == FP16:
            point = builder.fptrunc(point, stored)
        _store(builder, point, arguments[4])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32, types.int64, dtype), generate


@intrinsic
def fence(typing_context: Any) -> Any:
    """Let others see what was written past the caches before what is written from here on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if builder.module.triple.startswith(("x86_64", "i686")):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse.sfence", (), kind), [])
        else:
            builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@loop
def copy_bytes(source: int, out: int, count: int) -> None:
    """Write bytes, through the caches."""
    x, y = uint8(source, count), uint8(out, count)
    for j in range(count):
        y[j] = x[j]


@loop
def copy_lines(source: int, out: int, lines: int) -> None:
    """Write cache lines."""
    for j in range(lines):
        _copy_line(source + LINE * j, out + LINE * j)


@loop
def fp32_lines_along(end: int, a: int, b: int, weight: float, out: int, lines: int) -> None:
    """Write cache lines of end + weight*(b - a)."""
    for j in range(lines):
        _line_along(end + LINE * j, a + LINE * j, b + LINE * j, weight, out + LINE * j, FP32)


@loop
def bf16_lines_along(end: int, a: int, b: int, weight: float, out: int, lines: int) -> None:
    """The same of bf16."""
    for j in range(lines):
        _line_along(end + LINE * j, a + LINE * j, b + LINE * j, weight, out + LINE * j, BF16)


@loop
def fp16_lines_along(end: int, a: int, b: int, weight: float, out: int, lines: int) -> None:
    """The same of fp16."""
    for j in range(lines):
        _line_along(end + LINE * j, a + LINE * j, b + LINE * j, weight, out + LINE * j, FP16)


@inlined
def lines_along(dtype, end, a, b, weight, out, lines):
    """Write cache lines of end + weight*(b - a), all of one dtype, each element rounded once."""
    if dtype == FP32:
        fp32_lines_along(end, a, b, weight, out, lines)
    elif dtype == BF16:
        bf16_lines_along(end, a, b, weight, out, lines)
    else:
        fp16_lines_along(end, a, b, weight, out, lines)
