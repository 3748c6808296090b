"""The binary tree of `fused_merge.eager.sums`, block by block."""

from __future__ import annotations

import numpy as np

from fused_merge.compiled.jit import jit

ZERO = np.float32(0)


@jit
def _pairs(x, out):
    for j in range(len(out)):
        out[j] = x[2 * j] + x[2 * j + 1]


@jit
def tree_sum(x, other):
    """Return the sum of a vector by the tree; both it and another one of half the length are overwritten."""
    count = len(x)
    if count == 0:
        return ZERO
    while count > 1:
        half = count >> 1
        _pairs(x, other[:half])
        if count & 1:
            other[half] = x[count - 1] + ZERO
        count -= half
        x, other = other, x
    return x[0] + ZERO


@jit
def _multiply(x, y, out):
    for j in range(len(out)):
        out[j] = x[j] * y[j]


@jit
def inner_product(x, y, room, other):
    """Return <x, y> of two vectors of at most a block, in two rooms that are overwritten."""
    out = room[: len(x)]
    _multiply(x, y, out)
    return tree_sum(out, other)
