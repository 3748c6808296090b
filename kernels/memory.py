"""Loads and stores of a block of elements, and of single bits, behind addresses read from a table."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import rounding
from fused_merge.kernels.layout import Block

# Neighbors that are loaded together or not at all where few are needed: a 32-byte sector of fp32.
GROUP = tl.constexpr(8)


@triton.jit
def pointers(b, column, dtype: tl.constexpr, SPEC: tl.constexpr):
    """Where the elements of a block lie in the tensor whose address stands in a column of its entry."""
    first = tl.load(b.tensor_ptr + column).to(tl.pointer_type(dtype))
    if SPEC.ALIGNED:
        first = tl.multiple_of(first, 16)
    if b.base.type.is_block():
        return first + b.base
    else:
        return first + b.base + tl.arange(0, SPEC.BLOCK)


@triton.jit
def load(b, column, dtype: tl.constexpr, SPEC: tl.constexpr, OTHER: tl.constexpr = 0):
    """The elements of a block; OTHER where it does not access them."""
    if b.where is None:
        return tl.load(pointers(b, column, dtype, SPEC))
    else:
        return tl.load(pointers(b, column, dtype, SPEC), mask=b.where, other=OTHER)


@triton.jit
def store(b, column, x, dtype: tl.constexpr, SPEC: tl.constexpr):
    """Write the elements of a block, rounded to `dtype`."""
    tl.store(pointers(b, column, dtype, SPEC), rounding.nearest(x, dtype), mask=b.where)


@triton.jit
def within(b, condition):
    """A condition on the elements of a block, false for those that it does not access."""
    if b.where is None:
        return condition
    else:
        return b.where & condition


@triton.jit
def or_zero(b, x):
    """Values of the elements of a block, 0 for those that it does not access."""
    if b.where is None:
        return x
    else:
        return tl.where(b.where, x, 0.0)


@triton.jit
def near(b, marks, SPEC: tl.constexpr):
    """The block without the groups of neighbors in which no mark (0 or 1) is set: a mask that keeps accesses wide."""
    groups = tl.max(tl.reshape(marks, (SPEC.BLOCK // GROUP, GROUP)), axis=1)
    each = tl.broadcast_to(groups[:, None], (SPEC.BLOCK // GROUP, GROUP))
    marked = tl.max_constancy(tl.reshape(each, (SPEC.BLOCK,)) != 0, GROUP)
    return Block(b.tensor_ptr, b.scalars_ptr, b.base, within(b, marked))


@triton.jit
def store_bits(marks, bits_ptr, BLOCK: tl.constexpr):
    """Write a bit for each of BLOCK elements, 32 to an int32, the lowest bit first."""
    bits = tl.reshape(marks.to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    tl.store(bits_ptr + tl.arange(0, BLOCK // 32), tl.sum(bits, axis=1))


@triton.jit
def load_bits(bits_ptr, BLOCK: tl.constexpr):
    """The bits that `store_bits` wrote, as 0 and 1."""
    lanes = tl.arange(0, BLOCK)
    return (tl.load(bits_ptr + (lanes >> 5)) >> (lanes & 31)) & 1
