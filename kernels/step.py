"""The parts of a step, on a block of elements of one tensor; `merging_adamw` makes kernels of them."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.eager.philox import DOMAIN_ROUNDING, DOMAIN_UPDATE
from fused_merge.kernels import (
    access,
    adamw,
    consensus,
    merge_stats,
    philox,
    projection,
    rounding,
    rows,
    scalars,
    sparse,
    sparsify,
)

UPDATE_DOMAIN = tl.constexpr(DOMAIN_UPDATE)
ROUNDING_DOMAIN = tl.constexpr(DOMAIN_ROUNDING)


@triton.jit
def gradient(tensor, scalar, base, where, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """g, unscaled, clipped and turned as the scalars say."""
    g = access.load(tl.load(tensor + rows.GRAD_AT), base, where, BUILD.GRAD, BUILD.ALIGNED, MASKED, BLOCK)
    return tl.load(scalar + scalars.GRAD_FACTOR) * g.to(tl.float32)


@triton.jit
def load_moments(
    tensor,
    base,
    where,
    BUILD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    OTHER: tl.constexpr = 0,
):
    """m and v as they are stored."""
    m = access.load(tl.load(tensor + rows.EXP_AVG_AT), base, where, BUILD.EXP_AVG, BUILD.ALIGNED, MASKED, BLOCK, OTHER)
    at = tl.load(tensor + rows.EXP_AVG_SQ_AT)
    v = access.load(at, base, where, BUILD.EXP_AVG_SQ, BUILD.ALIGNED, MASKED, BLOCK, OTHER)
    return m.to(tl.float32), v.to(tl.float32)


@triton.jit
def store_moments(tensor, m, v, base, where, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Write m and v, each rounded once."""
    access.store(m, tl.load(tensor + rows.EXP_AVG_AT), base, where, BUILD.EXP_AVG, BUILD.ALIGNED, MASKED, BLOCK)
    access.store(v, tl.load(tensor + rows.EXP_AVG_SQ_AT), base, where, BUILD.EXP_AVG_SQ, BUILD.ALIGNED, MASKED, BLOCK)


@triton.jit
def update(scalar, m, v):
    """u of the moments after this step."""
    return adamw.update(
        m,
        v,
        tl.load(scalar + scalars.STEP_SIZE),
        tl.load(scalar + scalars.INV_SQRT_BIAS2),
        tl.load(scalar + scalars.EPS),
    )


@triton.jit
def advance(tensor, scalar, g, base, where, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """The moments after this step, and their u."""
    m, v = load_moments(tensor, base, where, BUILD, MASKED, BLOCK)
    m, v = adamw.moments(
        g,
        m,
        v,
        tl.load(scalar + scalars.BETA1),
        tl.load(scalar + scalars.ONE_MINUS_BETA1),
        tl.load(scalar + scalars.BETA2),
        tl.load(scalar + scalars.ONE_MINUS_BETA2),
    )
    return m, v, update(scalar, m, v)


@triton.jit
def load_full(tensor, base, where, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """tau before F, which something is projected onto."""
    if BUILD.PROJECT is None:
        return 0.0
    elif BUILD.FULL is None:
        at = tl.load(tensor + rows.TAU_AT)
        return access.load(at, base, where, BUILD.TAU, BUILD.ALIGNED, MASKED, BLOCK).to(tl.float32)
    else:
        at = tl.load(tensor + rows.FULL_AT)
        return access.load(at, base, where, BUILD.FULL, BUILD.ALIGNED, MASKED, BLOCK).to(tl.float32)


@triton.jit
def load_tau(tensor, full, base, where, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """F(tau)."""
    if BUILD.SPARSE:
        return sparse.load(
            tl.load(tensor + rows.TAU_AT),
            tl.load(tensor + rows.TAU_VALUES_AT),
            tl.load(tensor + rows.TAU_OFFSETS_AT),
            base,
            where,
            BUILD.TAU,
            not BUILD.ROW_PROGRAMS,
            MASKED,
            BLOCK,
        )
    elif BUILD.PROJECT is not None and BUILD.FULL is None:
        return full
    else:
        at = tl.load(tensor + rows.TAU_AT)
        return access.load(at, base, where, BUILD.TAU, BUILD.ALIGNED, MASKED, BLOCK).to(tl.float32)


@triton.jit
def coefficients(tensor, table, base, inside, BUILD: tl.constexpr, BLOCK: tl.constexpr):
    """<x, tau> and <tau, tau>: of the tensor, or for each element of its row."""
    if BUILD.PROJECT is None:
        return 0.0, 0.0
    else:
        at = table + 2 * tl.load(tensor + rows.COEFFICIENTS_AT)
        if BUILD.PROJECT_ROWS:
            at += 2 * ((base + tl.arange(0, BLOCK)) // tl.load(tensor + rows.COLUMNS_AT))
            return tl.load(at, mask=inside, other=0.0), tl.load(at + 1, mask=inside, other=0.0)
        else:
            return tl.load(at), tl.load(at + 1)


@triton.jit
def project(x, full, along, BUILD: tl.constexpr, ASCENT: tl.constexpr):
    """x projected onto tau, or out of conflict with it; `along` is <x, tau>, <tau, tau>, and the shares of "onto"."""
    dot, norm, rest_share, onto_share = along
    HOW: tl.constexpr = BUILD.PROJECT
    return projection.project(x, full, dot, norm, rest_share, onto_share, HOW, ASCENT)


@triton.jit
def fresh_update(
    tensor,
    scalar,
    full,
    along,
    base,
    where,
    BUILD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moments after this step and u, with what is projected projected."""
    g = gradient(tensor, scalar, base, where, BUILD, MASKED, BLOCK)
    if BUILD.PROJECT is not None and BUILD.PROJECT_ON == "gradient":
        g = project(g, full, along, BUILD, True)
    m, v, u = advance(tensor, scalar, g, base, where, BUILD, MASKED, BLOCK)
    if BUILD.PROJECT is not None and BUILD.PROJECT_ON == "update":
        u = project(u, full, along, BUILD, False)
    return m, v, u


@triton.jit
def since_anchor(
    tensor, scalar, decayed, u, base, where, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Where a merge of step-K starts, c*anchor, and the update since the last one, theta_decayed + u - c*anchor."""
    anchor = access.load(tl.load(tensor + rows.ANCHOR_AT), base, where, BUILD.ANCHOR, BUILD.ALIGNED, MASKED, BLOCK)
    origin = tl.load(scalar + scalars.ORIGIN_DECAY) * anchor.to(tl.float32)
    return origin, decayed + u - origin


@triton.jit
def load_weight(tensor, base, where, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """theta in full precision; a weight that was changed from outside overrules its fp32 master."""
    param = access.load(tl.load(tensor + rows.PARAM_AT), base, where, BUILD.PARAM, BUILD.ALIGNED, MASKED, BLOCK)
    if BUILD.MASTER == "none":
        return param.to(tl.float32)
    else:
        at = tl.load(tensor + rows.MASTER_AT)
        if BUILD.MASTER == "split":
            return rounding.join(param, access.load(at, base, where, tl.int16, BUILD.ALIGNED, MASKED, BLOCK))
        else:
            tl.static_assert(BUILD.MASTER == "fp32")
            master = access.load(at, base, where, tl.float32, BUILD.ALIGNED, MASKED, BLOCK)
            belongs = rounding.nearest(master, BUILD.PARAM).to(tl.float32) == param.to(tl.float32)
            return tl.where(belongs, master, param.to(tl.float32))


@triton.jit
def random_words(tensor, scalar, base, domain: tl.constexpr, BUILD: tl.constexpr, BLOCK: tl.constexpr):
    """The random word of each element at this step."""
    return philox.words(
        base,
        tl.load(tensor + rows.OFFSET_AT),
        tl.load(tensor + rows.LOCAL_INNER_AT),
        tl.load(tensor + rows.GLOBAL_INNER_AT),
        tl.load(tensor + rows.SEED_AT),
        tl.load(scalar + scalars.STEP).to(tl.uint32),
        tl.load(tensor + rows.ID_AT).to(tl.uint32),
        domain,
        BUILD.STRIDED,
        BUILD.QUADS,
        BLOCK,
    )


@triton.jit
def store_weight(
    tensor, scalar, start, merged, base, where, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """Write start + merged, rounded once, and return what is stored now, in full precision."""
    at = tl.load(tensor + rows.PARAM_AT)
    theta = tl.where(merged == 0, start, start + merged)
    if BUILD.MASTER == "split":
        weight, low = rounding.split(theta)
        access.store(low, tl.load(tensor + rows.MASTER_AT), base, where, tl.int16, BUILD.ALIGNED, MASKED, BLOCK)
        stored = rounding.join(weight, low)
    elif BUILD.STOCHASTIC:
        words = random_words(tensor, scalar, base, ROUNDING_DOMAIN, BUILD, BLOCK)
        weight = rounding.stochastic(theta, rounding.two_sum_error(start, merged), words, BUILD.PARAM)
        stored = weight.to(tl.float32)
    else:
        weight = rounding.nearest(theta, BUILD.PARAM)
        stored = weight.to(tl.float32)
        if BUILD.MASTER != "none":
            access.store(theta, tl.load(tensor + rows.MASTER_AT), base, where, tl.float32, BUILD.ALIGNED, MASKED, BLOCK)
            stored = theta
    access.store(weight, at, base, where, BUILD.PARAM, BUILD.ALIGNED, MASKED, BLOCK)
    return stored


@triton.jit
def kept(tensor, scalar, u, kth, base, BUILD: tl.constexpr, BLOCK: tl.constexpr):
    """F(u)."""
    SPARSIFY: tl.constexpr = BUILD.SPARSIFY
    if BUILD.RANKED:
        return sparsify.by_rank(u, kth, SPARSIFY)
    elif SPARSIFY == "random":
        words = random_words(tensor, scalar, base, UPDATE_DOMAIN, BUILD, BLOCK)
        return sparsify.random(u, words, tl.load(tensor + rows.THRESHOLD_AT).to(tl.uint32))
    else:
        tl.static_assert(SPARSIFY == "none")
        return u


@triton.jit
def merge(scalar, u_kept, tau, BUILD: tl.constexpr):
    """F(u) ⊕ F(tau)."""
    CONSENSUS: tl.constexpr = BUILD.CONSENSUS
    update_weight = tl.load(scalar + scalars.UPDATE_WEIGHT)
    tau_weight = tl.load(scalar + scalars.TAU_WEIGHT)
    return consensus.merge(u_kept, tau, update_weight, tau_weight, CONSENSUS)


@triton.jit
def add_up(tensor, scalar, u, u_kept, tau, merged, start, inside, sums, BUILD: tl.constexpr, BLOCK: tl.constexpr):
    """The statistics of a block, where they are collected."""
    if BUILD.STATS:
        products, counts = sums
        CONSENSUS: tl.constexpr = BUILD.CONSENSUS
        merge_stats.add_up(
            u,
            u_kept,
            tau,
            merged,
            start,
            inside,
            tl.load(scalar + scalars.UPDATE_WEIGHT),
            products,
            counts,
            BUILD.PARAM if BUILD.MASTER == "none" else tl.float32,
            CONSENSUS,
            BLOCK,
        )


@triton.jit
def add_merged(
    tensor,
    scalar,
    u,
    u_kept,
    full,
    inside,
    sums,
    base,
    BUILD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """theta*(1 - lr*wd) + (F(u) ⊕ F(tau)) for a step without an anchor."""
    decay = tl.load(scalar + scalars.DECAY)
    if BUILD.TAU is None:
        theta = load_weight(tensor, base, inside, BUILD, MASKED, BLOCK)
        store_weight(tensor, scalar, theta * decay, u, base, inside, BUILD, MASKED, BLOCK)
    else:
        tau = load_tau(tensor, full, base, inside, BUILD, MASKED, BLOCK)
        merged = merge(scalar, u_kept, tau, BUILD)
        if BUILD.SKIPS:
            something = (merged != 0).to(tl.int32) | (decay != 1.0).to(tl.int32)
            touched = access.near(something, inside, MASKED, BLOCK)
            theta = load_weight(tensor, base, touched, BUILD, True, BLOCK)
            store_weight(tensor, scalar, theta * decay, merged, base, touched, BUILD, True, BLOCK)
        else:
            start = load_weight(tensor, base, inside, BUILD, MASKED, BLOCK) * decay
            add_up(tensor, scalar, u, u_kept, tau, merged, start, inside, sums, BUILD, BLOCK)
            store_weight(tensor, scalar, start, merged, base, inside, BUILD, MASKED, BLOCK)


@triton.jit
def add_since_anchor(
    tensor,
    scalar,
    u,
    full,
    kth,
    inside,
    sums,
    base,
    BUILD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A step of step-K: AdamW's between merges; at a merge c*anchor + (F(u since then) ⊕ F(tau))."""
    merges = tl.load(scalar + scalars.MERGES) != 0.0
    start = load_weight(tensor, base, inside, BUILD, MASKED, BLOCK) * tl.load(scalar + scalars.DECAY)
    merged = u
    if merges:
        start, u = since_anchor(tensor, scalar, start, u, base, inside, BUILD, MASKED, BLOCK)
        u_kept = kept(tensor, scalar, u, kth, base, BUILD, BLOCK)
        tau = load_tau(tensor, full, base, inside, BUILD, MASKED, BLOCK)
        merged = merge(scalar, u_kept, tau, BUILD)
        add_up(tensor, scalar, u, u_kept, tau, merged, start, inside, sums, BUILD, BLOCK)
    stored = store_weight(tensor, scalar, start, merged, base, inside, BUILD, MASKED, BLOCK)
    if merges:
        at = tl.load(tensor + rows.ANCHOR_AT)
        access.store(stored, at, base, inside, BUILD.ANCHOR, BUILD.ALIGNED, MASKED, BLOCK)


@triton.jit
def step_chunk(
    tensor,
    scalar,
    along,
    kth,
    sums,
    base,
    inside,
    BUILD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The whole step for BLOCK elements from `base` on."""
    full = load_full(tensor, base, inside, BUILD, MASKED, BLOCK)
    m, v, u = fresh_update(tensor, scalar, full, along, base, inside, BUILD, MASKED, BLOCK)
    store_moments(tensor, m, v, base, inside, BUILD, MASKED, BLOCK)
    # lr = 0 moves the moments and leaves the weights, bit for bit.
    if tl.load(scalar + scalars.MOVES) != 0.0:
        if BUILD.ANCHOR is not None:
            add_since_anchor(tensor, scalar, u, full, kth, inside, sums, base, BUILD, MASKED, BLOCK)
        else:
            u_kept = kept(tensor, scalar, u, kth, base, BUILD, BLOCK)
            add_merged(tensor, scalar, u, u_kept, full, inside, sums, base, BUILD, MASKED, BLOCK)


@triton.jit
def update_again(
    tensor,
    scalar,
    along,
    base,
    where,
    BUILD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The u that F sees, once more; if MASKED of the elements that `where` says."""
    full = load_full(tensor, base, where, BUILD, MASKED, BLOCK)
    if BUILD.RESUMES:
        # Of 0, an IEEE root takes the long way: what is left out is 1.
        m, v = load_moments(tensor, base, where, BUILD, MASKED, BLOCK, 1)
        u = update(scalar, m, v)
        if BUILD.PROJECT is not None and BUILD.PROJECT_ON == "update":
            u = project(u, full, along, BUILD, False)
    else:
        _, _, u = fresh_update(tensor, scalar, full, along, base, where, BUILD, MASKED, BLOCK)
        if BUILD.ANCHOR is not None:
            decayed = load_weight(tensor, base, where, BUILD, MASKED, BLOCK) * tl.load(scalar + scalars.DECAY)
            _, u = since_anchor(tensor, scalar, decayed, u, base, where, BUILD, MASKED, BLOCK)
    return u


@triton.jit
def resume_chunk(
    tensor,
    scalar,
    along,
    kth,
    marks,
    base,
    inside,
    BUILD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rest of a step whose moments are stored already: merge what is marked, add, round."""
    near = access.near(marks, inside, MASKED, BLOCK)
    u = update_again(tensor, scalar, along, base, near, BUILD, True, BLOCK)
    # What is not marked is dropped without having been looked at.
    u_kept = tl.where(marks != 0, kept(tensor, scalar, u, kth, base, BUILD, BLOCK), 0.0)
    full = 0.0
    if BUILD.PROJECT is not None and BUILD.FULL is None and not BUILD.SPARSE:
        full = load_full(tensor, base, inside, BUILD, MASKED, BLOCK)
    add_merged(tensor, scalar, u, u_kept, full, inside, (0, 0), base, BUILD, MASKED, BLOCK)
