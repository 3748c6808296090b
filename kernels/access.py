"""Loads and stores of a block of elements, and of single bits, behind addresses read from a table."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import rounding

# Neighbours that are loaded together or not at all where few are needed: a 32-byte sector of fp32.
GROUP = tl.constexpr(8)


@triton.jit
def pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The typed pointer behind an int64 address; ALIGNED promises a multiple of 16 bytes."""
    p = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def load(
    address,
    base,
    where,
    dtype: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHER: tl.constexpr = 0,
):
    """BLOCK elements from element `base` (int64) on; if MASKED only those `where` says, and OTHER elsewhere."""
    at = pointer(address, dtype, ALIGNED) + base + tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(at, mask=where, other=OTHER)
    else:
        return tl.load(at)


@triton.jit
def store(
    x, address, base, where, dtype: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write BLOCK elements from element `base` (int64) on, rounded to `dtype`; if MASKED only those `where` says."""
    at = pointer(address, dtype, ALIGNED) + base + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(at, rounding.nearest(x, dtype), mask=where)
    else:
        tl.store(at, rounding.nearest(x, dtype))


@triton.jit
def group_any(marks, BLOCK: tl.constexpr):
    """For each element whether any mark (0 or 1) in its group of neighbours is set: a mask that keeps accesses wide."""
    groups = tl.max(tl.reshape(marks, (BLOCK // GROUP, GROUP)), axis=1)
    every = tl.reshape(tl.broadcast_to(groups[:, None], (BLOCK // GROUP, GROUP)), (BLOCK,))
    return tl.max_constancy(every != 0, GROUP)


@triton.jit
def near(marks, inside, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """`group_any`, and not past the end of the tensor: a bound on single elements, only where it is needed."""
    if MASKED:
        return inside & group_any(marks, BLOCK)
    else:
        return group_any(marks, BLOCK)


@triton.jit
def store_bits(marks, words, BLOCK: tl.constexpr):
    """Write a bit for each of BLOCK elements, 32 to an int32, the lowest bit first."""
    bits = tl.reshape(marks.to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :]
    tl.store(words + tl.arange(0, BLOCK // 32), tl.sum(bits, axis=1))


@triton.jit
def load_bits(words, BLOCK: tl.constexpr):
    """The bits that `store_bits` wrote, as 0 and 1."""
    lanes = tl.arange(0, BLOCK)
    return (tl.load(words + (lanes >> 5)) >> (lanes & 31)) & 1
