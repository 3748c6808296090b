"""Reading of `fused_merge.eager.sparse.SparseTensor`: a bit an element, and the kept values packed in order."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fused_merge.compiled import memory
from fused_merge.compiled.jit import jit
from fused_merge.compiled.layout import ENTRY
from fused_merge.eager.sparse import BLOCK as SPARSE_BLOCK


@intrinsic
def _lowest_bit(typing_context: Any, word: Any) -> Any:
    """The number of the lowest one bit of a word that has one."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.zext(builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(types.int32), generate


@jit
def tau_places(t, base, count, places):
    """Write where `count` elements from `base` on, a multiple of 1024, are stored; return the first one and how many.

    The first counts the values of the tensor, the places count from `base`.
    """
    block, found = base // SPARSE_BLOCK, 0
    if t[ENTRY.wide_offsets]:
        first = memory.longs(t[ENTRY.tau_offsets] + 8 * block, 1)[0]
    else:
        first = np.int64(memory.words(t[ENTRY.tau_offsets] + 4 * block, 1)[0])
    mask = memory.words(t[ENTRY.tau] + 4 * (base // 32), (count + 31) // 32)
    for j in range(len(mask)):
        word = mask[j]
        while word != 0:
            places[found] = 32 * j + _lowest_bit(word)
            found += 1
            word = np.int32(word & (word - 1))
    return first, found
