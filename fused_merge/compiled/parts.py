"""Blocks of tensors in passes that read them as they are: no step, and all rows of the table in their order."""

from __future__ import annotations

from fused_merge.compiled import memory
from fused_merge.compiled.jit import inlined
from fused_merge.compiled.memory import BLOCK, FP32, int64
from fused_merge.compiled.threads import TASK


@inlined
def locate(a, block, k):
    """Return of which tensor a block is, the k-th or a later one, and the number of its first element."""
    firsts = a[TASK.firsts]
    while block >= int64(firsts + 8 * (k + 1), 1)[0]:
        k += 1
    return k, BLOCK * (block - int64(firsts + 8 * k, 1)[0])


@inlined
def load_part(address, dtype, base, count, room):
    """Return where elements lie as fp32: in the tensor, or in a room that they are widened into."""
    if dtype == FP32:
        return address + 4 * base
    memory.widen(dtype, address + 2 * base, room, count)
    return room
