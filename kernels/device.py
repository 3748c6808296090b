"""Device functions on loaded values, each with a twin in `fused_merge.eager`."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import INTERPRETED as _INTERPRETED

INTERPRETED = tl.constexpr(_INTERPRETED)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 to `dtype`, to nearest even. The interpreter would truncate to bf16, so there it is done on bits."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The typed pointer behind an int64 address read from a table; ALIGNED promises a multiple of 16 bytes."""
    p = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        p = tl.multiple_of(p, 16)
    return p


@triton.jit
def load(address, base, left, dtype: tl.constexpr, ALIGNED: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements from element `base` (int64) on; zeros past `left` elements, unless FULL."""
    lanes = tl.arange(0, BLOCK)
    at = pointer(address, dtype, ALIGNED) + base + lanes
    if FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=lanes < left, other=0.0)


@triton.jit
def store(
    x,
    address,
    base,
    left,
    dtype: tl.constexpr,
    ALIGNED: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write BLOCK elements from element `base` (int64) on, rounded to `dtype`; none past `left`, unless FULL."""
    lanes = tl.arange(0, BLOCK)
    at = pointer(address, dtype, ALIGNED) + base + lanes
    if FULL:
        tl.store(at, round_to(x, dtype))
    else:
        tl.store(at, round_to(x, dtype), mask=lanes < left)


@triton.jit
def moments(g, m, v, beta1, one_minus_beta1, beta2, one_minus_beta2):
    """`eager.adamw.moments`: m = b1*m + (1 - b1)*g and v = b2*v + (1 - b2)*g^2."""
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    return m, v


@triton.jit
def adamw_update(m, v, step_size, inv_sqrt_bias2, eps):
    """`eager.adamw.update`: u = -lr * (m / bc1) / (sqrt(v / bc2) + eps), in IEEE arithmetic."""
    return tl.div_rn(-(step_size * m), tl.sqrt_rn(v) * inv_sqrt_bias2 + eps)


@triton.jit
def linear(u, tau, update_weight, tau_weight):
    """`eager.consensus.linear`: (1 - alpha) * u + alpha * tau."""
    return update_weight * u + tau_weight * tau


@triton.jit
def philox_block(block, seed, step, tensor_id, domain: tl.constexpr):
    """The four uint32 words of the Philox blocks `block` (int64), as `eager.philox` counts them."""
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
def random_keep(
    base,
    offset,
    local_inner,
    global_inner,
    seed,
    step,
    tensor_id,
    threshold,
    domain: tl.constexpr,
    STRIDED: tl.constexpr,
    QUADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`eager.philox.keep_mask` of the BLOCK local elements from `base` (int64) on.

    QUADS: four neighbours that start at a multiple of 4 share a Philox block (offset and inner sizes are
    multiples of 4); one evaluation then serves four elements. Otherwise each element makes its own.
    """
    if QUADS:
        i = base + 4 * tl.arange(0, BLOCK // 4)
        e = global_element(i, offset, local_inner, global_inner, STRIDED)
        w0, w1, w2, w3 = philox_block(e >> 2, seed, step, tensor_id, domain)
        # Interleaving even and odd words puts them in element order without shared memory.
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    else:
        i = base + tl.arange(0, BLOCK)
        e = global_element(i, offset, local_inner, global_inner, STRIDED)
        w0, w1, w2, w3 = philox_block(e >> 2, seed, step, tensor_id, domain)
        lane = (e & 3).to(tl.int32)
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word < threshold
