"""The parts of a step, on a block of elements of one tensor; `merging_adamw` makes kernels of them."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import adamw, consensus, memory, merge_stats, operands, projection, sparsify
from fused_merge.kernels.layout import ENTRY, SCALAR


@triton.jit
def fresh_update(b, tau_dense, along, SPEC: tl.constexpr):
    """The moments after this step, where it has any, and u, with what is projected projected.

    `along` is <x, tau> and <tau, tau>.
    """
    g = projection.project(b, operands.gradient(b, SPEC), tau_dense, along, SPEC, "gradient")
    m, v, u = adamw.advance(b, g, SPEC)
    return m, v, projection.project(b, u, tau_dense, along, SPEC, "update")


@triton.jit
def since_anchor(b, decayed, u, SPEC: tl.constexpr):
    """Where a merge of step-K starts, c*anchor, and the update since the last one, theta_decayed + u - c*anchor."""
    origin = tl.load(b.scalars_ptr + SCALAR.origin_decay) * operands.load_anchor(b, SPEC)
    return origin, decayed + u - origin


@triton.jit
def sparsified(b, u, kth, SPEC: tl.constexpr):
    """F(u)."""
    if SPEC.SPARSIFY == "magnitude":
        return sparsify.magnitude(u, kth)
    elif SPEC.SPARSIFY == "soft_threshold":
        return sparsify.soft_threshold(u, kth)
    elif SPEC.SPARSIFY == "random":
        threshold = tl.load(b.tensor_ptr + ENTRY.keep_threshold).to(tl.uint32)
        return sparsify.random(u, operands.random_bits(b, operands.UPDATE_DOMAIN, SPEC), threshold)
    else:
        tl.static_assert(SPEC.SPARSIFY == "none")
        return u


@triton.jit
def merge(b, u_kept, tau, SPEC: tl.constexpr):
    """F(u) ⊕ F(tau)."""
    update_weight = tl.load(b.scalars_ptr + SCALAR.update_weight)
    tau_weight = tl.load(b.scalars_ptr + SCALAR.tau_weight)
    CONSENSUS: tl.constexpr = SPEC.CONSENSUS
    return consensus.merge(u_kept, tau, update_weight, tau_weight, CONSENSUS)


@triton.jit
def add_merged(b, u, u_kept, found, sums_ptr, SPEC: tl.constexpr):
    """theta*(1 - lr*wd) + (F(u) ⊕ F(tau)) for a step without an anchor."""
    decay = tl.load(b.scalars_ptr + SCALAR.decay)
    if SPEC.TAU is None:
        operands.store_weight(b, operands.load_weight(b, SPEC) * decay, u, SPEC)
    else:
        tau = operands.load_tau(b, found, SPEC)
        merged = merge(b, u_kept, tau, SPEC)
        if SPEC.SKIPS:
            touched = memory.near(b, (merged != 0).to(tl.int32) | (decay != 1.0).to(tl.int32), SPEC)
            operands.store_weight(touched, operands.load_weight(touched, SPEC) * decay, merged, SPEC)
        else:
            start = operands.load_weight(b, SPEC) * decay
            merge_stats.add_up(b, u, u_kept, tau, merged, start, sums_ptr, SPEC)
            operands.store_weight(b, start, merged, SPEC)


@triton.jit
def merge_at(b, start, u, tau_dense, kth, sums_ptr, SPEC: tl.constexpr):
    """F(u) ⊕ F(tau), to be added to `start`; statistics count it."""
    u_kept = sparsified(b, u, kth, SPEC)
    tau = operands.load_tau(b, operands.find_tau(b, tau_dense, SPEC), SPEC)
    merged = merge(b, u_kept, tau, SPEC)
    merge_stats.add_up(b, u, u_kept, tau, merged, start, sums_ptr, SPEC)
    return merged


@triton.jit
def merge_added_elsewhere(b, along, kth, sums_ptr, SPEC: tl.constexpr):
    """anchor + (F(u) ⊕ F(tau)) for the u that another optimizer has added to the anchor."""
    tau_dense = operands.load_tau_dense(b, SPEC)
    start, u = operands.added_elsewhere(b, SPEC)
    u = projection.project(b, u, tau_dense, along, SPEC, "update")
    stored = operands.store_weight(b, start, merge_at(b, start, u, tau_dense, kth, sums_ptr, SPEC), SPEC)
    if SPEC.KEEPS_ANCHOR:
        memory.store(b, ENTRY.anchor, stored, SPEC.ANCHOR, SPEC)


@triton.jit
def add_since_anchor(b, u, tau_dense, kth, sums_ptr, SPEC: tl.constexpr):
    """A step of step-K: AdamW's between merges; at a merge c*anchor + (F(u since then) ⊕ F(tau))."""
    merges = tl.load(b.scalars_ptr + SCALAR.merges) != 0.0
    start = operands.load_weight(b, SPEC) * tl.load(b.scalars_ptr + SCALAR.decay)
    merged = u
    if merges:
        start, u = since_anchor(b, start, u, SPEC)
        merged = merge_at(b, start, u, tau_dense, kth, sums_ptr, SPEC)
    stored = operands.store_weight(b, start, merged, SPEC)
    if merges:
        memory.store(b, ENTRY.anchor, stored, SPEC.ANCHOR, SPEC)


@triton.jit
def step_block(b, along, kth, sums_ptr, SPEC: tl.constexpr):
    """The whole step of a block."""
    if SPEC.GRAD is None:
        merge_added_elsewhere(b, along, kth, sums_ptr, SPEC)
    else:
        tau_dense, found = operands.load_tau_dense(b, SPEC), 0.0
        if SPEC.TAU is not None and SPEC.ANCHOR is None:
            # On the way with the gradient: after it, memory would be waited for once more.
            found = operands.find_tau(b, tau_dense, SPEC)
        m, v, u = fresh_update(b, tau_dense, along, SPEC)
        operands.store_moments(b, m, v, SPEC)
        # lr = 0 moves the moments and leaves the weights, bit for bit.
        if tl.load(b.scalars_ptr + SCALAR.moves) != 0.0:
            if SPEC.ANCHOR is not None:
                add_since_anchor(b, u, tau_dense, kth, sums_ptr, SPEC)
            else:
                add_merged(b, u, sparsified(b, u, kth, SPEC), found, sums_ptr, SPEC)


@triton.jit
def update_since_merge(b, u, SPEC: tl.constexpr):
    """The u that F sees: that of this step, or of all steps since the last merge of step-K."""
    if SPEC.ANCHOR is not None and SPEC.GRAD is not None:
        decayed = operands.load_weight(b, SPEC) * tl.load(b.scalars_ptr + SCALAR.decay)
        _, u = since_anchor(b, decayed, u, SPEC)
    return u


@triton.jit
def update_again(b, along, SPEC: tl.constexpr):
    """The u that F sees, once more."""
    tau_dense = operands.load_tau_dense(b, SPEC)
    if SPEC.RESUMES:
        # Of 0, an IEEE root takes the long way: what is left out is 1.
        m, v = operands.load_moments(b, SPEC, 1)
        return projection.project(b, adamw.update(b, m, v), tau_dense, along, SPEC, "update")
    else:
        _, _, u = fresh_update(b, tau_dense, along, SPEC)
        return update_since_merge(b, u, SPEC)


@triton.jit
def resume_block(b, along, kth, marks, SPEC: tl.constexpr):
    """The rest of a step whose moments are stored already: merge what is marked, add, round."""
    u = update_again(memory.near(b, marks, SPEC), along, SPEC)
    # What is not marked is dropped without having been looked at.
    u_kept = tl.where(marks != 0, sparsified(b, u, kth, SPEC), 0.0)
    found = operands.find_tau(b, operands.load_tau_dense(b, SPEC), SPEC)
    add_merged(b, u, u_kept, found, (0, 0), SPEC)
