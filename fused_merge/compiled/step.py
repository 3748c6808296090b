"""One block of a step: how u is found, merged and added, in the order of `fused_merge.eager.merging_adamw`."""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import arithmetic, memory, philox, projection, rounding, sparse
from fused_merge.compiled.arithmetic import ONE, ZERO
from fused_merge.compiled.jit import jit
from fused_merge.compiled.layout import (
    ANCHOR,
    ENTRY,
    EXP_AVG,
    EXP_AVG_SQ,
    FULL_MASTER,
    GRAD,
    KEPT,
    LINEAR,
    MAGNITUDE,
    MASTER,
    MERGED,
    NO_MASTER,
    NONE,
    PROJECTED,
    RANDOM,
    SCALAR,
    SCALED,
    START,
    TAU,
    THETA,
    UPDATE,
    VALUES,
    WEIGHT,
)
from fused_merge.compiled.memory import BLOCK, FP32
from fused_merge.eager.philox import DOMAIN_ROUNDING, DOMAIN_UPDATE

# How u is found: with the moments advanced, with them left as they are, or from moments that have advanced.
ADVANCE, PEEK, AGAIN = range(3)


# --- u


@jit
def load_weight(t, base, out, scratch):
    """Write theta in full precision; a weight that was changed from outside overrules its fp32 master."""
    count = len(out)
    if t[ENTRY.master_kind] == NO_MASTER:
        out[:] = memory.load(t[ENTRY.param], t[ENTRY.param_dtype], base, count, scratch.rows[WEIGHT])
    elif t[ENTRY.master_kind] == FULL_MASTER:
        param = memory.load(t[ENTRY.param], t[ENTRY.param_dtype], base, count, scratch.rows[WEIGHT])
        master, rounded = memory.floats(t[ENTRY.master] + 4 * base, count), scratch.rows[MASTER][:count]
        memory.nearest(master, t[ENTRY.param_dtype], scratch.bits, rounded)
        rounding.with_master(param, master, rounded, out)
    else:
        high, low = memory.halves(t[ENTRY.param] + 2 * base, count), memory.halves(t[ENTRY.master] + 2 * base, count)
        rounding.join(high, low, out)


@jit
def merges_since_anchor(t, s):
    """Return whether this step merges what came since the last merge of step-K."""
    return t[ENTRY.anchor] != 0 and t[ENTRY.grad] != 0 and s[SCALAR.merges] != ZERO


@jit
def find_update(t, index, s, base, count, how, scratch):
    """Return the u that F sees, in scratch; where a merge is since an anchor, START is where it starts."""
    u = scratch.rows[UPDATE][:count]
    if t[ENTRY.grad] == 0:
        _added_elsewhere(t, base, u, scratch)
    else:
        _adamw(t, index, s, base, count, how, scratch, u)
    if projection.projects(t, True):
        x = scratch.rows[PROJECTED][:count]
        x[:] = u
        projection.project(t, index, s, base, x, scratch, u)
    if merges_since_anchor(t, s):
        start, x = scratch.rows[START][:count], scratch.rows[PROJECTED][:count]
        load_weight(t, base, start, scratch)
        x[:] = u
        anchor = memory.load(t[ENTRY.anchor], t[ENTRY.anchor_dtype], base, count, scratch.rows[ANCHOR])
        decay = memory.floats(t[ENTRY.anchor_decay], 1)[0] * s[SCALAR.decay]
        arithmetic.since_anchor(start, s[SCALAR.decay], x, anchor, decay, u)
    return u


@jit
def to_project(t, index, s, base, count, scratch):
    """Return the gradient, or the update, before it is projected; nothing is changed."""
    x = scratch.rows[SCALED][:count]
    if not projection.projects(t, True):
        g = memory.load(t[ENTRY.grad], t[ENTRY.grad_dtype], base, count, scratch.rows[GRAD])
        arithmetic.scaled(g, s[SCALAR.grad_factor], x)
    elif t[ENTRY.grad] == 0:
        _added_elsewhere(t, base, x, scratch)
    else:
        _adamw(t, index, s, base, count, PEEK, scratch, x)
    return x


@jit
def _added_elsewhere(t, base, u, scratch):
    """Write what another optimizer has added to the anchor; that is where a merge starts."""
    start, weight = scratch.rows[START][: len(u)], scratch.rows[THETA][: len(u)]
    start[:] = memory.load(t[ENTRY.anchor], t[ENTRY.anchor_dtype], base, len(u), scratch.rows[ANCHOR])
    load_weight(t, base, weight, scratch)
    arithmetic.difference(weight, start, u)


@jit
def _adamw(t, index, s, base, count, how, scratch, u):
    m = memory.load(t[ENTRY.exp_avg], t[ENTRY.exp_avg_dtype], base, count, scratch.rows[EXP_AVG])
    v = memory.load(t[ENTRY.exp_avg_sq], t[ENTRY.exp_avg_sq_dtype], base, count, scratch.rows[EXP_AVG_SQ])
    if how == AGAIN:
        arithmetic.update_again(m, v, u, s)
        return
    g, factor = memory.load(t[ENTRY.grad], t[ENTRY.grad_dtype], base, count, scratch.rows[GRAD]), s[SCALAR.grad_factor]
    if projection.projects(t, False):
        x = scratch.rows[SCALED][:count]
        arithmetic.scaled(g, factor, x)
        g, factor = scratch.rows[PROJECTED][:count], ONE
        projection.project(t, index, s, base, x, scratch, g)
    if how == ADVANCE:
        arithmetic.advance(g, factor, m, v, u, s)
        memory.store(t[ENTRY.exp_avg], t[ENTRY.exp_avg_dtype], base, m)
        memory.store(t[ENTRY.exp_avg_sq], t[ENTRY.exp_avg_sq_dtype], base, v)
    else:
        arithmetic.peek(g, factor, m, v, u, s)


# --- F


@jit
def load_tau(t, base, count, scratch):
    """Return F(tau) of a block."""
    if t[ENTRY.tau_values] == 0:
        return memory.load(t[ENTRY.tau], t[ENTRY.tau_dtype], base, count, scratch.rows[TAU])
    tau, places = scratch.rows[TAU][:count], scratch.places[1]
    first, found = sparse.tau_places(t, base, count, places)
    values = memory.load(t[ENTRY.tau_values], t[ENTRY.tau_dtype], first, found, scratch.rows[VALUES])
    tau[:] = ZERO
    for k in range(found):
        tau[places[k]] = values[k]
    return tau


@jit
def keep(t, s, base, u, kth, scratch):
    """Return F(u) of a block; `kth` is the pattern of the threshold of a ranked F."""
    kind, kept = t[ENTRY.sparsify], scratch.rows[KEPT][: len(u)]
    if kind == NONE:
        return u
    if kind == RANDOM:
        places = scratch.places[0]
        found = philox.kept_places(t, base, len(u), s[SCALAR.step], DOMAIN_UPDATE, scratch, places)
        kept[:] = ZERO
        for k in range(found):
            kept[places[k]] = u[places[k]]
    elif kind == MAGNITUDE:
        arithmetic.keep_from(u, kth, kept)
    else:
        arithmetic.shrink_by(u, memory.as_float(np.uint32(kth)), kept)
    return kept


# --- whole blocks


@jit
def step_block(t, index, s, base, count, kth, scratch):
    """Step every element of a block; return u, F(u), F(tau) and what was merged, for statistics."""
    u = find_update(t, index, s, base, count, ADVANCE, scratch)
    kept = tau = merged = u
    weighs = s[SCALAR.moves] != ZERO
    merges = t[ENTRY.tau] != 0 and (t[ENTRY.anchor] == 0 or s[SCALAR.merges] != ZERO)
    if not weighs:
        return u, kept, tau, merged
    in_place = t[ENTRY.param_dtype] == FP32 and t[ENTRY.anchor] == 0 and t[ENTRY.stochastic] == 0
    if merges:
        kept, tau = keep(t, s, base, u, kth, scratch), load_tau(t, base, count, scratch)
        if in_place and t[ENTRY.consensus] == LINEAR and t[ENTRY.stats] == 0:
            theta = memory.floats(t[ENTRY.param] + 4 * base, count)
            weights = s[SCALAR.update_weight], s[SCALAR.tau_weight]
            arithmetic.decay_and_merge(theta, kept, tau, *weights, s[SCALAR.decay])
            return u, kept, tau, merged
        merged = scratch.rows[MERGED][:count]
        arithmetic.consensus(
            t[ENTRY.consensus], kept, tau, s[SCALAR.update_weight], s[SCALAR.tau_weight], merged
        )
    if in_place and t[ENTRY.stats] == 0:
        arithmetic.decay_and_add(memory.floats(t[ENTRY.param] + 4 * base, count), merged, s[SCALAR.decay])
        return u, kept, tau, merged
    start = scratch.rows[START][:count]
    if t[ENTRY.grad] != 0 and not merges_since_anchor(t, s):
        weight = scratch.rows[THETA][:count]
        load_weight(t, base, weight, scratch)
        arithmetic.scaled(weight, s[SCALAR.decay], start)
    store_weight(t, s, base, start, merged, scratch)
    if t[ENTRY.anchor] != 0 and t[ENTRY.keeps_anchor] != 0 and s[SCALAR.merges] != ZERO:
        weight = scratch.rows[THETA][:count]
        load_weight(t, base, weight, scratch)
        memory.store_all(t[ENTRY.anchor], t[ENTRY.anchor_dtype], base, weight)
    return u, kept, tau, merged


@jit
def store_weight(t, s, base, start, merged, scratch):
    """Write start + merged, rounded once."""
    theta = scratch.rows[THETA][: len(start)]
    arithmetic.add(start, merged, theta)
    if t[ENTRY.stochastic] != 0:
        random = scratch.random[0, : len(start)]
        philox.rounding_words(t, base, s[SCALAR.step], scratch, random)
        rounding.store_stochastic(t[ENTRY.param], t[ENTRY.param_dtype], base, start, merged, theta, random)
    elif t[ENTRY.master_kind] == NO_MASTER or t[ENTRY.master_kind] == FULL_MASTER:
        memory.store_all(t[ENTRY.param], t[ENTRY.param_dtype], base, theta)
        if t[ENTRY.master_kind] == FULL_MASTER:
            memory.floats(t[ENTRY.master] + 4 * base, len(theta))[:] = theta
    else:
        high = memory.halves(t[ENTRY.param] + 2 * base, len(theta))
        rounding.split(theta, high, memory.halves(t[ENTRY.master] + 2 * base, len(theta)))


# --- weights to which nothing is added are left alone


@jit
def step_kept(t, index, s, base, count, scratch):
    """Step a block of which a random F keeps little: of the weights, touch those to which something is added."""
    places, tau_places = scratch.places[0], scratch.places[1]
    found = first = stored = 0
    if s[SCALAR.moves] != ZERO:
        # What will be touched is asked for before the moments are advanced.
        found = philox.kept_places(t, base, count, s[SCALAR.step], DOMAIN_UPDATE, scratch, places)
        first, stored = sparse.tau_places(t, base, count, tau_places)
        prefetch_weights(t, base, places[:found])
        prefetch_weights(t, base, tau_places[:stored])
    u = find_update(t, index, s, base, count, ADVANCE, scratch)
    values = scratch.rows[KEPT][:found]
    for k in range(found):
        values[k] = u[places[k]]
    decay_in_place(t, s, base, count)
    touch(t, s, base, places[:found], values, first, tau_places[:stored], scratch)


@jit
def prefetch_weights(t, base, places):
    """Ask for the weights at some places of a block."""
    size = 4 if t[ENTRY.param_dtype] == FP32 else 2
    for k in range(len(places)):
        memory.prefetch(t[ENTRY.param] + size * (base + places[k]))


@jit
def decay_in_place(t, s, base, count):
    """Decay all weights of a block, which are fp32 where they decay at all."""
    if s[SCALAR.decay] != ONE and s[SCALAR.moves] != ZERO:
        theta = memory.floats(t[ENTRY.param] + 4 * base, count)
        arithmetic.decay(theta, s[SCALAR.decay])


@jit
def touch(t, s, base, places, values, first, tau_places, scratch):
    """Add to the weights of a block the merge of what is kept of u, and of tau, whose values are from `first` on."""
    tau = memory.load(t[ENTRY.tau_values], t[ENTRY.tau_dtype], first, len(tau_places), scratch.rows[VALUES])
    at = scratch.zeros
    for k in range(len(tau_places)):
        at[tau_places[k]] = tau[k]
    for k in range(len(places)):
        place = places[k]
        _touch_one(t, s, base + place, values[k], at[place])
        at[place] = ZERO
    for k in range(len(tau_places)):
        place = tau_places[k]
        # What was kept of both has been added.
        if at[place] != ZERO:
            _touch_one(t, s, base + place, ZERO, at[place])
            at[place] = ZERO


@jit
def _touch_one(t, s, i, u, tau):
    merged = arithmetic.consensus_one(t[ENTRY.consensus], u, tau, s[SCALAR.update_weight], s[SCALAR.tau_weight])
    if merged == ZERO:
        return
    start = memory.load_one(t[ENTRY.param], t[ENTRY.param_dtype], i)
    theta = start + merged
    if t[ENTRY.stochastic] != 0:
        random = philox.random_word(t, i, s[SCALAR.step], DOMAIN_ROUNDING)
        rounding.store_stochastic_one(
            t[ENTRY.param], t[ENTRY.param_dtype], i, start, merged, theta, np.uint32(random)
        )
    else:
        memory.store_one(t[ENTRY.param], t[ENTRY.param_dtype], i, theta)
