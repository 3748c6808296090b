"""What a step reads and writes of a block: gradient, moments, deltas and weights, in full precision."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.eager.philox import DOMAIN_ROUNDING, DOMAIN_UPDATE
from fused_merge.kernels import memory, philox, rounding, sparse
from fused_merge.kernels.layout import ENTRY, SCALAR

UPDATE_DOMAIN = tl.constexpr(DOMAIN_UPDATE)
ROUNDING_DOMAIN = tl.constexpr(DOMAIN_ROUNDING)


@triton.jit
def gradient(b, SPEC: tl.constexpr):
    """g, unscaled, clipped and turned as the scalars say; 0 where another optimizer has used it up."""
    if SPEC.GRAD is None:
        return 0.0
    else:
        return tl.load(b.scalars_ptr + SCALAR.grad_factor) * memory.load(b, ENTRY.grad, SPEC.GRAD, SPEC).to(tl.float32)


@triton.jit
def load_moments(b, SPEC: tl.constexpr, OTHER: tl.constexpr = 0):
    """m and v as they are stored."""
    m = memory.load(b, ENTRY.exp_avg, SPEC.EXP_AVG, SPEC, OTHER)
    v = memory.load(b, ENTRY.exp_avg_sq, SPEC.EXP_AVG_SQ, SPEC, OTHER)
    return m.to(tl.float32), v.to(tl.float32)


@triton.jit
def store_moments(b, m, v, SPEC: tl.constexpr):
    """Write m and v, each rounded once."""
    memory.store(b, ENTRY.exp_avg, m, SPEC.EXP_AVG, SPEC)
    memory.store(b, ENTRY.exp_avg_sq, v, SPEC.EXP_AVG_SQ, SPEC)


@triton.jit
def load_anchor(b, SPEC: tl.constexpr):
    """The weights after the last merge."""
    return memory.load(b, ENTRY.anchor, SPEC.ANCHOR, SPEC).to(tl.float32)


@triton.jit
def load_tau_dense(b, SPEC: tl.constexpr):
    """tau before F, which something is projected onto."""
    if SPEC.PROJECT is None:
        return 0.0
    elif SPEC.TAU_DENSE is None:
        return memory.load(b, ENTRY.tau, SPEC.TAU, SPEC).to(tl.float32)
    else:
        return memory.load(b, ENTRY.tau_dense, SPEC.TAU_DENSE, SPEC).to(tl.float32)


@triton.jit
def find_tau(b, tau_dense, SPEC: tl.constexpr):
    """What of F(tau) can be read without having read anything else: all of it, or the bits of a sparse one."""
    if SPEC.SPARSE:
        return sparse.words(b, SPEC)
    elif SPEC.PROJECT is not None and SPEC.TAU_DENSE is None:
        return tau_dense
    else:
        return memory.load(b, ENTRY.tau, SPEC.TAU, SPEC)


@triton.jit
def load_tau(b, found, SPEC: tl.constexpr):
    """F(tau), of which `find_tau` has found something."""
    if SPEC.SPARSE:
        return sparse.load(b, found, SPEC)
    else:
        return found.to(tl.float32)


@triton.jit
def load_weight(b, SPEC: tl.constexpr):
    """theta in full precision; a weight that was changed from outside overrules its fp32 master."""
    param = memory.load(b, ENTRY.param, SPEC.PARAM, SPEC)
    if SPEC.MASTER == "none":
        return param.to(tl.float32)
    elif SPEC.MASTER == "split":
        return rounding.join(param, memory.load(b, ENTRY.master, tl.int16, SPEC))
    else:
        tl.static_assert(SPEC.MASTER == "fp32")
        master = memory.load(b, ENTRY.master, tl.float32, SPEC)
        belongs = rounding.nearest(master, SPEC.PARAM).to(tl.float32) == param.to(tl.float32)
        return tl.where(belongs, master, param.to(tl.float32))


@triton.jit
def added_elsewhere(b, SPEC: tl.constexpr):
    """The anchor, and the u that another optimizer has added to it."""
    anchor = load_anchor(b, SPEC)
    return anchor, load_weight(b, SPEC) - anchor


@triton.jit
def random_bits(b, domain: tl.constexpr, SPEC: tl.constexpr):
    """The random 32 bits of each element at this step."""
    entry_ptr = b.tensor_ptr
    shard = (
        tl.load(entry_ptr + ENTRY.offset),
        tl.load(entry_ptr + ENTRY.local_inner),
        tl.load(entry_ptr + ENTRY.global_inner),
    )
    step = tl.load(b.scalars_ptr + SCALAR.step).to(tl.uint32)
    key = tl.load(entry_ptr + ENTRY.seed), step, tl.load(entry_ptr + ENTRY.tensor_id).to(tl.uint32)
    if b.base.type.is_block():
        return philox.bits_of(b.base, shard, key, domain, SPEC.STRIDED)
    else:
        return philox.random_bits(b.base, shard, key, domain, SPEC.STRIDED, SPEC.QUADS, SPEC.BLOCK)


@triton.jit
def store_weight(b, start, merged, SPEC: tl.constexpr):
    """Write start + merged, rounded once, and return what is stored now, in full precision."""
    theta = tl.where(merged == 0, start, start + merged)
    if SPEC.MASTER == "split":
        weight, low = rounding.split(theta)
        memory.store(b, ENTRY.master, low, tl.int16, SPEC)
        stored = rounding.join(weight, low)
    elif SPEC.STOCHASTIC:
        bits = random_bits(b, ROUNDING_DOMAIN, SPEC)
        weight = rounding.stochastic(theta, rounding.two_sum_error(start, merged), bits, SPEC.PARAM)
        stored = weight.to(tl.float32)
    else:
        weight = rounding.nearest(theta, SPEC.PARAM)
        stored = weight.to(tl.float32)
        if SPEC.MASTER != "none":
            memory.store(b, ENTRY.master, theta, tl.float32, SPEC)
            stored = theta
    memory.store(b, ENTRY.param, weight, SPEC.PARAM, SPEC)
    return stored
