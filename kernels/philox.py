"""Random bits that depend on (seed, step, name, element) alone; the equations of `fused_merge/eager/philox.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_words(block, seed, step, tensor_id, domain: tl.constexpr):
    """The four uint32 words of the Philox blocks `block` (int64)."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32) | (domain << 24)
    zero = low * 0
    return tl.philox(seed, low, high, zero + step, zero + tensor_id)


@triton.jit
def global_element(i, offset, local_inner, global_inner, STRIDED: tl.constexpr):
    """`ShardIndex`: the index in the unsharded tensor of local element `i` (int64)."""
    if STRIDED:
        return offset + (i // local_inner) * global_inner + i % local_inner
    else:
        return offset + i


@triton.jit
def random_bits(
    base,
    offset,
    local_inner,
    global_inner,
    seed,
    step,
    tensor_id,
    domain: tl.constexpr,
    STRIDED: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`eager.philox.random_words` of the BLOCK local elements from `base` (int64) on, as uint32.

    QUADS: four neighbors that start at a multiple of 4 share a Philox block (base, offset and inner sizes are
    multiples of 4); one evaluation then serves four elements. Otherwise each element makes its own.
    """
    if QUADS:
        i = base + 4 * tl.arange(0, BLOCK // 4)
        e = global_element(i, offset, local_inner, global_inner, STRIDED)
        w0, w1, w2, w3 = block_words(e >> 2, seed, step, tensor_id, domain)
        # Interleaving even and odd words puts them in element order without shared memory.
        return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        i = base + tl.arange(0, BLOCK)
        e = global_element(i, offset, local_inner, global_inner, STRIDED)
        w0, w1, w2, w3 = block_words(e >> 2, seed, step, tensor_id, domain)
        lane = (e & 3).to(tl.int32)
        return tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
