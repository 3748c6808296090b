"""The binary tree of `fused_merge.eager.sums`, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np

from fused_merge.compiled.jit import inlined, loop
from fused_merge.compiled.memory import fp32

ZERO: Any = np.float32(0)


@inlined
def _halved(source, out, count):
    """Write the sums of neighbors; a zero at the end of an odd level stands for all the padding above it."""
    x, y, half = fp32(source, count), fp32(out, (count + 1) >> 1), count >> 1
    for j in range(half):
        y[j] = x[2 * j] + x[2 * j + 1]
    if count & 1 != 0:
        y[half] = x[count - 1] + ZERO
    return (count + 1) >> 1


@loop
def tree_sum(source: int, other: int, count: int) -> float:
    """Return the sum of a vector by the tree; it and another one, of half the length, are overwritten."""
    if count == 0:
        return ZERO
    while count > 1:
        count = _halved(source, other, count)
        source, other = other, source
    return fp32(source, 1)[0] + ZERO


@loop
def inner_product(left: int, right: int, factor: float, room: int, other: int, count: int) -> float:
    """Return <s*x, y> of two vectors of at most a block, in two rooms that are overwritten."""
    x, y, product = fp32(left, count), fp32(right, count), fp32(room, count)
    for j in range(count):
        product[j] = (factor * x[j]) * y[j]
    return tree_sum(room, other, count)
