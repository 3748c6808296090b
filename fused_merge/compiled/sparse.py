"""Reading of `fused_merge.eager.sparse.SparseTensor`: a bit an element, and the kept values packed in order."""

from __future__ import annotations

from fused_merge.compiled.jit import inlined, loop
from fused_merge.compiled.layout import ENTRY
from fused_merge.compiled.memory import int32, int64, lowest_bit
from fused_merge.eager.sparse import BLOCK as SPARSE_BLOCK


@loop
def set_places(mask: int, words: int, places: int) -> int:
    """Write which bits of words of 64 are set; return how many."""
    bits, out, found = int64(mask, words), int32(places, 64 * words), 0
    for j in range(words):
        word = bits[j]
        while word != 0:
            out[found] = 64 * j + lowest_bit(word)
            found += 1
            word &= word - 1
    return found


@inlined
def tau_places(t, base, count, places):
    """Write where `count` elements from `base` on, a multiple of 1024, are stored; return the first one and how many.

    The first counts the values of the tensor, the places count from `base`.
    """
    block = base // SPARSE_BLOCK
    first = int64(t[ENTRY.tau_offsets] + 8 * block, 1)[0] if t[ENTRY.wide_offsets] != 0 else _narrow(t, block)
    # A block of the format is whole words of 64 bits; those of padding are not set.
    return first, set_places(t[ENTRY.tau_mask] + 4 * (base // 32), (count + 63) // 64, places)


@inlined
def _narrow(t, block):
    return 0 + int32(t[ENTRY.tau_offsets] + 4 * block, 1)[0]
