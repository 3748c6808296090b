"""Decoding of `fused_merge.eager.sparse.SparseTensor`: a bit an element, and the kept values packed in order."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.eager import sparse as layout

SPARSE_BLOCK = tl.constexpr(layout.BLOCK)
WORDS = tl.constexpr(layout.WORDS)


@triton.jit
def popcount(x):
    """The number of one bits of each int32."""
    pairs = x - ((x >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return (octets * 0x01010101) >> 24


@triton.jit
def load(
    mask_address,
    values_address,
    offsets_address,
    base,
    where,
    dtype: tl.constexpr,
    WHOLE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Decode BLOCK elements from `base` (int64) on as fp32; if MASKED only those `where` says.

    WHOLE promises that `base` is a multiple of 1024; otherwise the bits before it in its block are counted.
    """
    lanes = tl.arange(0, BLOCK)
    mask = mask_address.to(tl.pointer_type(tl.int32))
    start = tl.load(offsets_address.to(tl.pointer_type(tl.int32)) + base // SPARSE_BLOCK)
    if WHOLE:
        words = mask + base // 32 + (lanes >> 5)
        shift = lanes & 31
    else:
        words = mask + ((base + lanes) >> 5)
        shift = ((base + lanes) & 31).to(tl.int32)
        before = (base % SPARSE_BLOCK).to(tl.int32) - 32 * tl.arange(0, WORDS)
        head = tl.load(mask + base // SPARSE_BLOCK * WORDS + tl.arange(0, WORDS))
        # Of the word that `base` lies in, the bits below it; of later words none.
        inside = tl.where(before >= 32, -1, (1 << tl.minimum(tl.maximum(before, 0), 31)) - 1)
        start += tl.sum(popcount(head & inside))
    if MASKED:
        word = tl.load(words, mask=where, other=0)
    else:
        word = tl.load(words)
    bit = (word >> shift) & 1
    rank = tl.cumsum(bit, axis=0) - bit
    values = values_address.to(tl.pointer_type(dtype)) + (start + rank)
    return tl.load(values, mask=bit == 1, other=0.0).to(tl.float32)
