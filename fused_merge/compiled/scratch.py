"""The room that a thread works in: rows of one vector, of whose address all functions are told."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from fused_merge.compiled.memory import BLOCK

# Elements of four bytes in a row: a block, and a few that vectors of random words need more.
ROOM = BLOCK + 16
# Longer rows are projected with products that were found before the step.
LONGEST_ROW = ROOM * BLOCK

(
    # Of a block, fp32.
    GRAD, SCALED, PROJECTED, EXP_AVG, EXP_AVG_SQ, UPDATE, KEPT, TAU, TAU_DENSE, VALUES, MERGED, START, WEIGHT, ANCHOR,
    MASTER, THETA, PRODUCT, SUMS,
    # fp32, zeros between calls.
    ZEROS,
    # Which elements are kept, or listed, uint8; places of elements in a block, int32; patterns of 16 bits.
    MARKS, PLACES, TAU_PLACES, BITS,
    # Random words, uint32.
    RANDOM_WORDS, WORDS,
    # <x, tau> and <tau, tau> of a block and of a row, fp32; of which tensor and row, int64; of a row's blocks, fp32.
    PAIR, ALONG, ROW_OF_ALONG, NODES, NODES_OF_TAU,
    # Outside a step: up to three operands, the difference of two, and a result, fp32; that in its own dtype.
    FIRST, SECOND, THIRD, DIFFERENCE, RESULT, ROUNDED,
    ROWS,
) = range(37)  # fmt: skip


# Bytes of a room.
SCRATCH = 4 * ROWS * ROOM


def scratch(threads: int) -> np.ndarray:
    """Return a room for each thread."""
    return np.zeros((threads, ROWS * ROOM), np.float32)


@intrinsic
def row(typing_context: Any, scratch: Any, number: Any) -> Any:
    """Return the address of a row."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        size = context.get_constant(types.int64, 4 * ROOM)
        return builder.add(arguments[0], builder.mul(arguments[1], size))

    return types.int64(types.int64, types.int64), generate
