"""Decoding of `fused_merge.eager.sparse.SparseTensor`: a bit an element, and the kept values packed in order."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.eager import sparse as eager
from fused_merge.kernels.layout import ENTRY

SPARSE_BLOCK, WORDS = tl.constexpr(eager.BLOCK), tl.constexpr(eager.WORDS)


@triton.jit
def popcount(x):
    """The number of one bits of each int32."""
    pairs = x - ((x >> 1) & 0x55555555)
    nibbles = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (nibbles + (nibbles >> 4)) & 0x0F0F0F0F
    return (octets * 0x01010101) >> 24


@triton.jit
def bits_before(words, PER: tl.constexpr):
    """How many bits stand before each of some int32 words, in the PER neighbors that it belongs to."""
    counts = tl.reshape(popcount(words), (words.shape[0] // PER, PER))
    return tl.reshape(tl.cumsum(counts, axis=1) - counts, (words.shape[0],))


@triton.jit
def words(b, SPEC: tl.constexpr):
    """Of F(tau) of a block, how many values stand before it, and the bits: the word of each element, and its place."""
    base, lanes = b.base, tl.arange(0, SPEC.BLOCK)
    mask_ptr = tl.load(b.tensor_ptr + ENTRY.tau).to(tl.pointer_type(tl.int32))
    offsets_ptr = tl.load(b.tensor_ptr + ENTRY.tau_offsets).to(tl.pointer_type(tl.int32))
    start = tl.load(offsets_ptr + base // SPARSE_BLOCK)
    if SPEC.ROW_PROGRAMS:
        # A row begins anywhere in a block of the format: count the bits before it.
        words_ptr = mask_ptr + ((base + lanes) >> 5)
        shift = ((base + lanes) & 31).to(tl.int32)
        before = (base % SPARSE_BLOCK).to(tl.int32) - 32 * tl.arange(0, WORDS)
        head = tl.load(mask_ptr + base // SPARSE_BLOCK * WORDS + tl.arange(0, WORDS))
        # Of the word that `base` lies in, the bits below it; of later words none.
        inside = tl.where(before >= 32, -1, (1 << tl.minimum(tl.maximum(before, 0), 31)) - 1)
        start += tl.sum(popcount(head & inside))
    else:
        words_ptr = mask_ptr + base // 32 + (lanes >> 5)
        shift = lanes & 31
    if b.where is None:
        word = tl.load(words_ptr)
    else:
        word = tl.load(words_ptr, mask=b.where, other=0)
    return start, word, shift


@triton.jit
def load(b, found, SPEC: tl.constexpr):
    """Decode F(tau) of a block, of which `words` are found, as fp32."""
    start, word, shift = found
    bit = (word >> shift) & 1
    rank = tl.cumsum(bit, axis=0) - bit
    values_ptr = tl.load(b.tensor_ptr + ENTRY.tau_values).to(tl.pointer_type(SPEC.TAU))
    return tl.load(values_ptr + (start + rank), mask=bit == 1, other=0.0).to(tl.float32)
