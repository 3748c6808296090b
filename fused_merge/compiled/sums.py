"""The binary tree of `fused_merge.eager.sums`, block by block.

Four levels at once: of 256 elements the sums of 16 and 16, in vectors and without a memory in between. Zeros in the
place of elements that are not there are the padding of the tree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fused_merge.compiled.jit import inlined, loop

ZERO: Any = np.float32(0)

# Elements that are added up at once, and to how many sums.
_SPAN, _NODES = 256, 16
_VECTOR = ir.VectorType(ir.FloatType(), _NODES)
# Which lanes of two vectors are the left ones of neighbors: those with an even number in each quarter, then the
# quarters with an even number. After two levels of each, the sums are in order.
_LANES = [4 * quarter + lane + start for quarter in range(4) for start in (0, 16) for lane in (0, 2)]
_QUARTERS = [4 * quarter + lane + start for start in (0, 16) for quarter in (0, 2) for lane in range(4)]


_I32 = ir.IntType(32)


def _mask(lanes: Any) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), _NODES), list(lanes))


def _add_up(builder: Any, vectors: Any, out: Any) -> None:
    """Write the sums of 16 and 16 lanes of 16 vectors."""
    for left, step in ((_LANES, 1), (_LANES, 1), (_QUARTERS, 4), (_QUARTERS, 4)):
        masks = _mask(left), _mask(lane + step for lane in left)
        vectors = [
            builder.fadd(*(builder.shuffle_vector(*pair, mask) for mask in masks))
            for pair in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    builder.store(vectors[0], builder.inttoptr(out, _VECTOR.as_pointer()), align=4)


def _splat(builder: Any, x: Any) -> Any:
    """Return 16 times one number."""
    undefined = ir.Constant(ir.VectorType(x.type, _NODES), ir.Undefined)
    return builder.shuffle_vector(builder.insert_element(undefined, x, _I32(0)), undefined, _mask([0] * _NODES))


def _vectors(builder: Any, address: Any, count: Any) -> Any:
    """Read 256 elements as 16 vectors; from `count` on they are zeros that are not read."""
    first = builder.inttoptr(address, _VECTOR.as_pointer())
    kind = ir.FunctionType(_VECTOR, [first.type, ir.IntType(32), ir.VectorType(ir.IntType(1), _NODES), _VECTOR])
    load = cgutils.get_or_insert_function(builder.module, kind, "llvm.masked.load.v16f32.p0")
    counts, zeros = _splat(builder, builder.trunc(count, ir.IntType(32))), ir.Constant(_VECTOR, [0.0] * _NODES)
    for i in range(_SPAN // _NODES):
        mask = builder.icmp_signed(">", counts, _mask(range(_NODES * i, _NODES * (i + 1))))
        yield builder.call(load, [builder.gep(first, [_I32(i)]), _I32(4), mask, zeros])


@intrinsic(prefer_literal=True)
def _add_span(typing_context: Any, source: Any, count: Any, out: Any) -> Any:
    """Write 16 sums of 256 elements, `count` of which are there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _add_up(builder, list(_vectors(builder, *arguments[:2])), arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic
def _add_products(typing_context: Any, left: Any, right: Any, factor: Any, count: Any, out: Any) -> Any:
    """Write 16 sums of 256 products (s*x)*y, `count` of which are there."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, y, factor, count, out = arguments
        factors, pairs = _splat(builder, factor), zip(*(_vectors(builder, a, count) for a in (x, y)), strict=True)
        _add_up(builder, [builder.fmul(builder.fmul(factors, x), y) for x, y in pairs], out)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64, types.int64), generate


@intrinsic
def _sum_of_nodes(typing_context: Any, source: Any) -> Any:
    """The sum of 16 elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x = builder.load(builder.inttoptr(arguments[0], _VECTOR.as_pointer()), align=4)
        while (count := x.type.count) > 1:
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), count // 2), list(range(i, count, 2))) for i in (0, 1)]
            x = builder.fadd(*(builder.shuffle_vector(x, x, mask) for mask in masks))
        return builder.extract_element(x, _I32(0))

    return types.float32(types.int64), generate


@inlined
def _root(source, count, other):
    """Return the sum of at most a span, in another row that is overwritten."""
    _add_span(source, count, other)
    return _sum_of_nodes(other) + ZERO


@loop
def tree_sum(source: int, other: int, count: int) -> float:
    """Return the sum of at most a row of scratch by the tree; it and another row are overwritten."""
    while count > _SPAN:
        spans, rest = count // _SPAN, count % _SPAN
        for j in range(spans):
            _add_span(source + 4 * _SPAN * j, _SPAN, other + 4 * _NODES * j)
        if rest != 0:
            _add_span(source + 4 * _SPAN * spans, rest, other + 4 * _NODES * spans)
        count = _NODES * (spans + (rest != 0))
        source, other = other, source
    return _root(source, count, other)


@loop
def inner_product(left: int, right: int, factor: float, room: int, other: int, count: int) -> float:
    """Return <s*x, y> of two vectors of at most a block, in two rows of scratch that are overwritten."""
    spans, rest = count // _SPAN, count % _SPAN
    for j in range(spans):
        _add_products(left + 4 * _SPAN * j, right + 4 * _SPAN * j, factor, _SPAN, room + 4 * _NODES * j)
    if rest != 0:
        at = 4 * _SPAN * spans
        _add_products(left + at, right + at, factor, rest, room + 4 * _NODES * spans)
    return _root(room, _NODES * (spans + (rest != 0)), other)
