"""Random bits that depend on (seed, step, name, element) alone; the equations of `fused_merge/eager/philox.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def four_words(i, shard, key, domain: tl.constexpr, STRIDED: tl.constexpr):
    """The logical elements that local elements i (int64) are, and the four words that each shares with neighbors.

    `shard` is a `ShardIndex`, `key` is seed, step and tensor id.
    """
    offset, local_inner, global_inner = shard
    seed, step, tensor_id = key
    if STRIDED:
        i = (i // local_inner) * global_inner + i % local_inner
    element = offset + i
    low = (element >> 2).to(tl.uint32)
    high = (element >> 34).to(tl.uint32) | (domain << 24)
    zero = low * 0
    return element, tl.philox(seed, low, high, zero + step, zero + tensor_id)


@triton.jit
def bits_of(i, shard, key, domain: tl.constexpr, STRIDED: tl.constexpr):
    """`eager.philox.random_words` of any local elements i (int64), as uint32."""
    element, words = four_words(i, shard, key, domain, STRIDED)
    w0, w1, w2, w3 = words
    lane = (element & 3).to(tl.int32)
    return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))


@triton.jit
def random_bits(
    base, shard, key, domain: tl.constexpr, STRIDED: tl.constexpr, QUADS: tl.constexpr, BLOCK: tl.constexpr
):
    """Those of the BLOCK local elements from `base` (int64) on.

    QUADS: four neighbors that start at a multiple of 4 share a Philox block (base, offset and inner sizes are
    multiples of 4); one evaluation then serves four elements. Otherwise each element makes its own.
    """
    if QUADS:
        _, words = four_words(base + 4 * tl.arange(0, BLOCK // 4), shard, key, domain, STRIDED)
        w0, w1, w2, w3 = words
        # Interleaving even and odd words puts them in element order without shared memory.
        return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        return bits_of(base + tl.arange(0, BLOCK), shard, key, domain, STRIDED)
