"""One block of a step: how u is found, merged and added, in the order of `fused_merge.eager.merging_adamw`.

t and s are a tensor's rows of the tables; rows of scratch, and elements of tensors, are addresses.
"""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import arithmetic, memory, philox, projection, rounding, sparse
from fused_merge.compiled.arithmetic import ONE, ZERO
from fused_merge.compiled.jit import inlined, jit
from fused_merge.compiled.layout import ENTRY, FULL_MASTER, LINEAR, MAGNITUDE, NO_MASTER, NONE, RANDOM, SCALAR
from fused_merge.compiled.memory import BF16, BLOCK, FP32, fp32, int32, load
from fused_merge.compiled.scratch import (
    ANCHOR,
    BITS,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    KEPT,
    MASTER,
    MERGED,
    PLACES,
    PROJECTED,
    RANDOM_WORDS,
    SCALED,
    START,
    TAU,
    TAU_PLACES,
    THETA,
    UPDATE,
    VALUES,
    WEIGHT,
    ZEROS,
    row,
)
from fused_merge.eager.philox import DOMAIN_ROUNDING, DOMAIN_UPDATE

# How u is found: with the moments advanced, with them left as they are, or from moments that have advanced.
ADVANCE, PEEK, AGAIN = range(3)


# --- u


@jit
def load_weight(t, base, out, count, scratch):
    """Write theta in full precision; a weight that was changed from outside overrules its fp32 master."""
    if t[ENTRY.master_kind] == NO_MASTER:
        memory.copy(load(t, ENTRY.param, base, count, row(scratch, WEIGHT)), out, count)
    elif t[ENTRY.master_kind] == FULL_MASTER:
        param, dtype = load(t, ENTRY.param, base, count, row(scratch, WEIGHT)), t[ENTRY.param_dtype]
        master, bits, rounded = t[ENTRY.master] + 4 * base, row(scratch, BITS), row(scratch, MASTER)
        memory.round_to(dtype, master, bits, count)
        memory.widen(dtype, bits, rounded, count)
        rounding.with_master(param, master, rounded, out, count)
    else:
        rounding.join(t[ENTRY.param] + 2 * base, t[ENTRY.master] + 2 * base, out, count)


@inlined
def merges_since_anchor(t, s):
    """Return whether this step merges what came since the last merge of step-K."""
    return t[ENTRY.anchor] != 0 and t[ENTRY.grad] != 0 and s[SCALAR.merges] != ZERO


@jit
def find_update(t, index, s, base, count, how, scratch):
    """Write the u that F sees to UPDATE; where a merge is since an anchor, START is where it starts."""
    u, x = row(scratch, UPDATE), row(scratch, PROJECTED)
    if t[ENTRY.grad] == 0:
        _added_elsewhere(t, base, u, count, scratch)
    else:
        _adamw(t, index, s, base, count, how, scratch, u)
    if projection.projects(t, True):
        memory.copy(u, x, count)
        projection.project(t, index, s, base, x, ONE, count, scratch, u)
    if merges_since_anchor(t, s):
        start, anchor = row(scratch, START), load(t, ENTRY.anchor, base, count, row(scratch, ANCHOR))
        load_weight(t, base, start, count, scratch)
        memory.copy(u, x, count)
        decay = fp32(t[ENTRY.anchor_decay], 1)[0] * s[SCALAR.decay]
        arithmetic.since_anchor(start, s[SCALAR.decay], x, anchor, decay, u, count)
    return u


@jit
def to_project(t, index, s, base, count, scratch):
    """Return the gradient or the update before it is projected, and what it is to be multiplied by."""
    if not projection.projects(t, True):
        return load(t, ENTRY.grad, base, count, row(scratch, GRAD)), s[SCALAR.grad_factor]
    x = row(scratch, SCALED)
    if t[ENTRY.grad] == 0:
        _added_elsewhere(t, base, x, count, scratch)
    else:
        _adamw(t, index, s, base, count, PEEK, scratch, x)
    return x, ONE


@jit
def _added_elsewhere(t, base, u, count, scratch):
    """Write what another optimizer has added to the anchor, which is where a merge starts."""
    start, weight = row(scratch, START), row(scratch, THETA)
    memory.copy(load(t, ENTRY.anchor, base, count, row(scratch, ANCHOR)), start, count)
    load_weight(t, base, weight, count, scratch)
    arithmetic.subtract(weight, start, u, count)


@jit
def _adamw(t, index, s, base, count, how, scratch, u):
    scalars = s.ctypes.data
    if how == AGAIN:
        m = load(t, ENTRY.exp_avg, base, count, row(scratch, EXP_AVG))
        v = load(t, ENTRY.exp_avg_sq, base, count, row(scratch, EXP_AVG_SQ))
        arithmetic.update_again(m, v, u, count, scalars)
        return
    m, v, g, dtype, factor = _load_moments_and_gradient(t, index, s, base, count, scratch)
    if how == PEEK:
        arithmetic.peek(g, dtype, factor, m, v, u, count, scalars)
        return
    arithmetic.advance(g, dtype, factor, m, v, u, count, scalars)
    memory.store(t, ENTRY.exp_avg, base, count, m)
    memory.store(t, ENTRY.exp_avg_sq, base, count, v)


@inlined
def _load_moments_and_gradient(t, index, s, base, count, scratch):
    """Return where they are, the gradient as fp32 or bf16 and projected, and what it is to be multiplied by."""
    m = load(t, ENTRY.exp_avg, base, count, row(scratch, EXP_AVG))
    v = load(t, ENTRY.exp_avg_sq, base, count, row(scratch, EXP_AVG_SQ))
    factor = s[SCALAR.grad_factor]
    if projection.changes_gradient(t):
        g, projected = load(t, ENTRY.grad, base, count, row(scratch, GRAD)), row(scratch, PROJECTED)
        projection.project(t, index, s, base, g, factor, count, scratch, projected)
        return m, v, projected, FP32, ONE
    if t[ENTRY.grad_dtype] == BF16:
        return m, v, t[ENTRY.grad] + 2 * base, BF16, factor
    return m, v, load(t, ENTRY.grad, base, count, row(scratch, GRAD)), FP32, factor


# --- F


@jit
def _load_tau(t, base, count, scratch):
    """Return F(tau) of a block."""
    if t[ENTRY.tau_mask] == 0:
        return load(t, ENTRY.tau, base, count, row(scratch, TAU))
    first, stored = sparse.tau_places(t, base, count, row(scratch, TAU_PLACES))
    values = load(t, ENTRY.tau, first, stored, row(scratch, VALUES))
    arithmetic.scatter(values, row(scratch, TAU_PLACES), stored, row(scratch, TAU), count)
    return row(scratch, TAU)


@jit
def _keep(t, s, base, count, u, kth, scratch):
    """Return F(u) of a block; `kth` is the pattern of the threshold of a ranked F."""
    kept = row(scratch, KEPT)
    if t[ENTRY.sparsify] == NONE:
        return u
    if t[ENTRY.sparsify] == RANDOM:
        places, values = row(scratch, PLACES), row(scratch, VALUES)
        found = philox.kept_places(t, base, count, s[SCALAR.step], DOMAIN_UPDATE, scratch, places)
        arithmetic.gather(u, places, found, values)
        arithmetic.scatter(values, places, found, kept, count)
    elif t[ENTRY.sparsify] == MAGNITUDE:
        arithmetic.keep_from(u, kth, kept, count)
    else:
        arithmetic.shrink_by(u, kth, kept, count)
    return kept


# --- whole blocks


@inlined
def merges_tau(t, s):
    """Return whether this step adds something of tau, if it adds anything."""
    return t[ENTRY.merges] != 0 and (t[ENTRY.anchor] == 0 or s[SCALAR.merges] != ZERO)


@inlined
def is_linear(t, s):
    """Return whether each element of a tensor is stepped by itself, in one loop."""
    merges = merges_tau(t, s)
    drops = merges and (t[ENTRY.sparsify] != NONE or t[ENTRY.consensus] != LINEAR or t[ENTRY.stats] != 0)
    stored = t[ENTRY.master_kind] == NO_MASTER and t[ENTRY.stochastic] == 0 and not (merges and t[ENTRY.anchor] != 0)
    return not drops and stored and not projection.projects(t, True) and s[SCALAR.moves] != ZERO


@jit
def step_linear(t, index, s, base, count, scratch):
    """Step a block of plain AdamW, or one that keeps everything and adds linearly."""
    m, v, g, dtype, factor = _load_moments_and_gradient(t, index, s, base, count, scratch)
    merges, theta, tau = merges_tau(t, s), t[ENTRY.param] + 2 * base, 0
    in_bf16 = dtype == BF16 and t[ENTRY.param_dtype] == BF16
    if in_bf16 and merges and t[ENTRY.tau_mask] == 0 and t[ENTRY.tau_dtype] == BF16:
        tau = t[ENTRY.tau] + 2 * base
    elif not in_bf16 or merges:
        if dtype == BF16:
            memory.widen_bf16(g, row(scratch, GRAD), count)
            g, dtype = row(scratch, GRAD), FP32
        theta = load(t, ENTRY.param, base, count, row(scratch, THETA))
        tau = _load_tau(t, base, count, scratch) if merges else 0
    arithmetic.advance_and_add(g, dtype, factor, m, v, theta, tau, count, s.ctypes.data)
    memory.store(t, ENTRY.exp_avg, base, count, m)
    memory.store(t, ENTRY.exp_avg_sq, base, count, v)
    if dtype == FP32:
        memory.store(t, ENTRY.param, base, count, theta)


@jit
def step_block(t, index, s, base, count, kth, scratch):
    """Step every element of a block; return where u, F(u), F(tau) and what was merged lie, for statistics."""
    u = find_update(t, index, s, base, count, ADVANCE, scratch)
    kept = tau = merged = u
    if s[SCALAR.moves] == ZERO:
        return u, kept, tau, merged
    if merges_tau(t, s):
        kept, tau = _keep(t, s, base, count, u, kth, scratch), _load_tau(t, base, count, scratch)
        merged, weights = row(scratch, MERGED), (s[SCALAR.update_weight], s[SCALAR.tau_weight])
        arithmetic.consensus(t[ENTRY.consensus], kept, tau, *weights, merged, count)
    start, weight = row(scratch, START), row(scratch, THETA)
    if t[ENTRY.grad] != 0 and not merges_since_anchor(t, s):
        load_weight(t, base, weight, count, scratch)
        arithmetic.multiply(weight, s[SCALAR.decay], start, count)
    _store_weight(t, s, base, start, merged, count, scratch)
    if t[ENTRY.anchor] != 0 and t[ENTRY.keeps_anchor] != 0 and s[SCALAR.merges] != ZERO:
        load_weight(t, base, weight, count, scratch)
        memory.store(t, ENTRY.anchor, base, count, weight)
    return u, kept, tau, merged


@jit
def _store_weight(t, s, base, start, merged, count, scratch):
    """Write start + merged, rounded once."""
    theta = row(scratch, THETA)
    arithmetic.add(start, merged, theta, count)
    if t[ENTRY.stochastic] != 0:
        random, dtype = row(scratch, RANDOM_WORDS), t[ENTRY.param_dtype]
        philox.rounding_words(t, base, count, s[SCALAR.step], scratch, random)
        out = t[ENTRY.param] + (4 if dtype == FP32 else 2) * base
        rounding.store_stochastic(out, dtype, start, merged, theta, random, count)
    elif t[ENTRY.master_kind] == NO_MASTER or t[ENTRY.master_kind] == FULL_MASTER:
        memory.store(t, ENTRY.param, base, count, theta)
        if t[ENTRY.master_kind] == FULL_MASTER:
            memory.copy(theta, t[ENTRY.master] + 4 * base, count)
    else:
        rounding.split(theta, t[ENTRY.param] + 2 * base, t[ENTRY.master] + 2 * base, count)


# --- weights to which nothing is added are left alone


@jit
def step_kept(t, index, s, base, count, scratch):
    """Step a block of which a random F keeps little: of the weights, touch those to which something is added."""
    places, tau_places, kept = row(scratch, PLACES), row(scratch, TAU_PLACES), row(scratch, KEPT)
    found = first = stored = 0
    if s[SCALAR.moves] != ZERO:
        found = philox.kept_places(t, base, count, s[SCALAR.step], DOMAIN_UPDATE, scratch, places)
        first, stored = sparse.tau_places(t, base, count, tau_places)
    u = find_update(t, index, s, base, count, ADVANCE, scratch)
    arithmetic.gather(u, places, found, kept)
    decay_in_place(t, s, base, count)
    touch(t, s, base, places, kept, found, first, tau_places, stored, scratch)


@inlined
def decay_in_place(t, s, base, count):
    """Decay all weights of a block, which are fp32 where they decay at all."""
    if s[SCALAR.decay] != ONE and s[SCALAR.moves] != ZERO:
        theta = t[ENTRY.param] + 4 * base
        arithmetic.multiply(theta, s[SCALAR.decay], theta, count)


@jit
def touch(t, s, base, places, kept, found, first, tau_places, stored, scratch):
    """Add to the weights of a block the merge of what is kept of u, and of tau, whose values are from `first` on."""
    tau, merged, zeros = row(scratch, TAU), row(scratch, MERGED), row(scratch, ZEROS)
    values = load(t, ENTRY.tau, first, stored, row(scratch, VALUES))
    total = arithmetic.join_lists(kept, places, found, values, tau_places, stored, zeros, tau, BLOCK)
    weights = s[SCALAR.update_weight], s[SCALAR.tau_weight]
    arithmetic.consensus(t[ENTRY.consensus], kept, tau, *weights, merged, total)
    theta = t[ENTRY.param] + (4 if t[ENTRY.param_dtype] == FP32 else 2) * base
    if t[ENTRY.stochastic] == 0:
        arithmetic.add_at(theta, t[ENTRY.param_dtype], places, merged, total)
        return
    at, steps = int32(places, total), fp32(merged, total)
    for k in range(total):
        if steps[k] != ZERO:
            i = base + at[k]
            start = memory.load_one(t[ENTRY.param], t[ENTRY.param_dtype], i)
            random = np.uint32(philox.random_word(t, i, s[SCALAR.step], DOMAIN_ROUNDING))
            rounding.store_one(t[ENTRY.param], t[ENTRY.param_dtype], i, start, steps[k], start + steps[k], random)
