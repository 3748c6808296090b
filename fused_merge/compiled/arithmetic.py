"""The equations of a step over the elements of a block, each beside that of `fused_merge.eager`.

Loops take addresses of fp32 numbers, of which `count` are worked on; they may lie in a tensor or in scratch.
"""

from __future__ import annotations

import numpy as np

from fused_merge.compiled.jit import inlined, loop
from fused_merge.compiled.layout import LINEAR, SCALAR, SCALARS, SIGN_PAPER, SIGN_REFERENCE
from fused_merge.compiled.memory import (
    BF16,
    BLOCK,
    FP32,
    as_bits,
    as_float,
    fp32,
    from_bf16,
    from_half,
    int32,
    nearest_bf16,
    to_half,
    uint16,
)
from fused_merge.eager.projection import RESIDUE

ZERO, ONE = np.float32(0), np.float32(1)
_RESIDUE = np.float32(RESIDUE)
_MAGNITUDE = np.int32(0x7FFFFFFF)


# --- adamw.py


@inlined
def add_one(start, merged):
    """What adds nothing changes no bit."""
    return start if merged == ZERO else start + merged


@inlined
def _update(m, v, step_size, inv_sqrt_bias2, eps):
    return -(step_size * m) / (np.sqrt(v) * inv_sqrt_bias2 + eps)


@inlined
def _moments(g, m, v, beta1, rest1, beta2, rest2):
    return beta1 * m + rest1 * g, beta2 * v + rest2 * (g * g)


@loop
def advance(
    grad: int, dtype: int, factor: float, exp_avg: int, exp_avg_sq: int, update: int, count: int, scalars: int
) -> None:
    """m = b1*m + (1 - b1)*g, v = b2*v + (1 - b2)*g^2 in place, and u; g, fp32 or bf16, is yet to be multiplied."""
    g, m, v, u = fp32(grad, count), fp32(exp_avg, count), fp32(exp_avg_sq, count), fp32(update, count)
    bits, s = uint16(grad, count), fp32(scalars, SCALARS)
    beta1, rest1, beta2, rest2 = s[SCALAR.beta1], s[SCALAR.one_minus_beta1], s[SCALAR.beta2], s[SCALAR.one_minus_beta2]
    step_size, inv_sqrt_bias2, eps = s[SCALAR.step_size], s[SCALAR.inv_sqrt_bias2], s[SCALAR.eps]
    if dtype == BF16:
        for j in range(count):
            m[j], v[j] = _moments(factor * from_bf16(bits[j]), m[j], v[j], beta1, rest1, beta2, rest2)
            u[j] = _update(m[j], v[j], step_size, inv_sqrt_bias2, eps)
    else:
        for j in range(count):
            m[j], v[j] = _moments(factor * g[j], m[j], v[j], beta1, rest1, beta2, rest2)
            u[j] = _update(m[j], v[j], step_size, inv_sqrt_bias2, eps)


@loop
def peek(
    grad: int, dtype: int, factor: float, exp_avg: int, exp_avg_sq: int, update: int, count: int, scalars: int
) -> None:
    """The u of `advance`, with the moments left as they are."""
    g, m, v, u = fp32(grad, count), fp32(exp_avg, count), fp32(exp_avg_sq, count), fp32(update, count)
    bits, s = uint16(grad, count), fp32(scalars, SCALARS)
    beta1, rest1, beta2, rest2 = s[SCALAR.beta1], s[SCALAR.one_minus_beta1], s[SCALAR.beta2], s[SCALAR.one_minus_beta2]
    step_size, inv_sqrt_bias2, eps = s[SCALAR.step_size], s[SCALAR.inv_sqrt_bias2], s[SCALAR.eps]
    if dtype == BF16:
        for j in range(count):
            m_now, v_now = _moments(factor * from_bf16(bits[j]), m[j], v[j], beta1, rest1, beta2, rest2)
            u[j] = _update(m_now, v_now, step_size, inv_sqrt_bias2, eps)
    else:
        for j in range(count):
            m_now, v_now = _moments(factor * g[j], m[j], v[j], beta1, rest1, beta2, rest2)
            u[j] = _update(m_now, v_now, step_size, inv_sqrt_bias2, eps)


@loop
def advance_and_add(
    grad: int, dtype: int, factor: float, exp_avg: int, exp_avg_sq: int, theta: int, tau: int, count: int, scalars: int
) -> None:
    """`advance`, and decay*theta + (u ⊕ tau) where all of both is kept, linear, or decay*theta + u where `tau` is 0.

    g, theta and tau are fp32 or bf16.
    """
    g, m, v = fp32(grad, count), fp32(exp_avg, count), fp32(exp_avg_sq, count)
    x, d, s = fp32(theta, count), fp32(tau, count), fp32(scalars, SCALARS)
    g_bits, x_bits, d_bits = uint16(grad, count), uint16(theta, count), uint16(tau, count)
    beta1, rest1, beta2, rest2 = s[SCALAR.beta1], s[SCALAR.one_minus_beta1], s[SCALAR.beta2], s[SCALAR.one_minus_beta2]
    step_size, inv_sqrt_bias2, eps = s[SCALAR.step_size], s[SCALAR.inv_sqrt_bias2], s[SCALAR.eps]
    decay, update_weight, tau_weight = s[SCALAR.decay], s[SCALAR.update_weight], s[SCALAR.tau_weight]
    if dtype == BF16 and tau == 0:
        for j in range(count):
            m[j], v[j] = _moments(factor * from_bf16(g_bits[j]), m[j], v[j], beta1, rest1, beta2, rest2)
            u = _update(m[j], v[j], step_size, inv_sqrt_bias2, eps)
            x_bits[j] = nearest_bf16(as_bits(add_one(from_bf16(x_bits[j]) * decay, u)))
    elif dtype == BF16:
        for j in range(count):
            m[j], v[j] = _moments(factor * from_bf16(g_bits[j]), m[j], v[j], beta1, rest1, beta2, rest2)
            u = _update(m[j], v[j], step_size, inv_sqrt_bias2, eps)
            merged = update_weight * u + tau_weight * from_bf16(d_bits[j])
            x_bits[j] = nearest_bf16(as_bits(add_one(from_bf16(x_bits[j]) * decay, merged)))
    elif tau == 0:
        for j in range(count):
            m[j], v[j] = _moments(factor * g[j], m[j], v[j], beta1, rest1, beta2, rest2)
            x[j] = add_one(x[j] * decay, _update(m[j], v[j], step_size, inv_sqrt_bias2, eps))
    else:
        for j in range(count):
            m[j], v[j] = _moments(factor * g[j], m[j], v[j], beta1, rest1, beta2, rest2)
            u = _update(m[j], v[j], step_size, inv_sqrt_bias2, eps)
            x[j] = add_one(x[j] * decay, update_weight * u + tau_weight * d[j])


@loop
def update_again(exp_avg: int, exp_avg_sq: int, update: int, count: int, scalars: int) -> None:
    """u from moments that have advanced."""
    m, v, u, s = fp32(exp_avg, count), fp32(exp_avg_sq, count), fp32(update, count), fp32(scalars, SCALARS)
    step_size, inv_sqrt_bias2, eps = s[SCALAR.step_size], s[SCALAR.inv_sqrt_bias2], s[SCALAR.eps]
    for j in range(count):
        u[j] = _update(m[j], v[j], step_size, inv_sqrt_bias2, eps)


@loop
def multiply(source: int, factor: float, out: int, count: int) -> None:
    """factor * x; `out` may be x."""
    x, y = fp32(source, count), fp32(out, count)
    if source == out:
        # Only what is known to be one array is not taken for two that overlap.
        for j in range(count):
            y[j] = factor * y[j]
    else:
        for j in range(count):
            y[j] = factor * x[j]


@loop
def subtract(left: int, right: int, out: int, count: int) -> None:
    """x - y."""
    x, y, difference = fp32(left, count), fp32(right, count), fp32(out, count)
    for j in range(count):
        difference[j] = x[j] - y[j]


# --- merging_adamw.py


@loop
def since_anchor(
    start: int, decay: float, update: int, anchor: int, anchor_decay: float, since: int, count: int
) -> None:
    """The update since the last merge of step-K, decay*start + u - c*anchor; `start` becomes c*anchor."""
    x, u, a, out = fp32(start, count), fp32(update, count), fp32(anchor, count), fp32(since, count)
    for j in range(count):
        origin = anchor_decay * a[j]
        out[j] = x[j] * decay + u[j] - origin
        x[j] = origin


@loop
def add(start: int, merged: int, theta: int, count: int) -> None:
    """start + merged."""
    x, y, out = fp32(start, count), fp32(merged, count), fp32(theta, count)
    for j in range(count):
        out[j] = add_one(x[j], y[j])


# --- projection.py


@loop
def remove_conflict(source: int, factor: float, tau: int, along: int, ascent: int, out: int, count: int) -> None:
    """s*x without its component along tau, where the step goes against it; `along` is <s*x, tau> and <tau, tau>."""
    x, d, y, products = fp32(source, count), fp32(tau, count), fp32(out, count), fp32(along, 2)
    dot, norm = products[0], products[1]
    if norm > ZERO and (dot > ZERO if ascent != 0 else dot < ZERO):
        c = dot / norm
        for j in range(count):
            component, g = c * d[j], factor * x[j]
            rest = g - component
            y[j] = ZERO if abs(rest) < _RESIDUE * (abs(g) + abs(component)) else rest
    else:
        for j in range(count):
            y[j] = factor * x[j]


@loop
def onto(source: int, factor: float, tau: int, along: int, strength: float, rest: float, out: int, count: int) -> None:
    """(1 - strength)*s*x + strength*c*tau, c*tau the component of s*x along tau."""
    x, d, y, products = fp32(source, count), fp32(tau, count), fp32(out, count), fp32(along, 2)
    dot, norm = products[0], products[1]
    if norm > ZERO:
        c = dot / norm
        for j in range(count):
            y[j] = rest * (factor * x[j]) + strength * (c * d[j])
    else:
        for j in range(count):
            y[j] = factor * x[j]


# --- consensus.py


@inlined
def consensus_one(kind, u, tau, update_weight, tau_weight):
    """⊕ of two numbers."""
    if kind == LINEAR:
        return update_weight * u + tau_weight * tau
    if kind == SIGN_REFERENCE:
        positive = u + tau >= ZERO
        u = ZERO if (u < ZERO if positive else u > ZERO) else u
        tau = ZERO if (tau < ZERO if positive else tau > ZERO) else tau
        return update_weight * u + tau_weight * tau
    a, b = update_weight * u, tau_weight * tau
    conflict = (a > ZERO and b < ZERO) or (a < ZERO and b > ZERO)
    a_kept = ZERO if conflict and abs(a) < abs(b) else a
    b_kept = ZERO if conflict and abs(b) < abs(a) else b
    return a_kept + b_kept


@loop
def consensus(kind: int, update: int, tau: int, update_weight: float, tau_weight: float, out: int, count: int) -> None:
    """⊕ of the elements of a block."""
    u, d, merged = fp32(update, count), fp32(tau, count), fp32(out, count)
    if kind == LINEAR:
        for j in range(count):
            merged[j] = update_weight * u[j] + tau_weight * d[j]
    elif kind == SIGN_REFERENCE:
        for j in range(count):
            merged[j] = consensus_one(SIGN_REFERENCE, u[j], d[j], update_weight, tau_weight)
    else:
        for j in range(count):
            merged[j] = consensus_one(SIGN_PAPER, u[j], d[j], update_weight, tau_weight)


# --- sparsify.py


@loop
def keep_from(source: int, kth: int, out: int, count: int) -> None:
    """x where its magnitude is at least that of the pattern `kth`."""
    x, patterns, y = fp32(source, count), int32(source, count), fp32(out, count)
    threshold = np.int32(kth)
    for j in range(count):
        y[j] = x[j] if (patterns[j] & _MAGNITUDE) >= threshold else ZERO


@inlined
def shrink_one(x, threshold):
    """x shrunk by a threshold; NaN stays NaN."""
    shrunk = (x - threshold if x > ZERO else x + threshold) if abs(x) > threshold else ZERO
    return x if x != x else shrunk


@loop
def shrink_by(source: int, kth: int, out: int, count: int) -> None:
    """x shrunk by the magnitude of the pattern `kth`."""
    x, y, threshold = fp32(source, count), fp32(out, count), as_float(np.uint32(kth))
    for j in range(count):
        y[j] = shrink_one(x[j], threshold)


@loop
def gather(source: int, places: int, found: int, out: int) -> None:
    """Write the elements at some places."""
    x, at, y = fp32(source, found), int32(places, found), fp32(out, found)
    for k in range(found):
        y[k] = x[at[k]]


@loop
def scatter(source: int, places: int, found: int, out: int, count: int) -> None:
    """Write zeros, and elements at their places."""
    x, at, y = fp32(source, found), int32(places, found), fp32(out, count)
    for j in range(count):
        y[j] = ZERO
    for k in range(found):
        y[at[k]] = x[k]


# --- weights to which nothing is added are left alone


@loop
def join_lists(
    update: int, places: int, found: int, tau: int, tau_places: int, stored: int, zeros: int, out: int, size: int
) -> int:
    """Make one list of what is kept of u and of tau: places, u, and tau as `out`, with zeros where only one is kept.

    Places and u are appended to; `zeros` are so many, before and after. Returns how long the list is.
    """
    u, at, t, at_tau = fp32(update, size), int32(places, size), fp32(tau, stored), int32(tau_places, stored)
    spread, d, total = fp32(zeros, size), fp32(out, size), found
    for k in range(stored):
        spread[at_tau[k]] = t[k]
    for k in range(found):
        d[k] = spread[at[k]]
        spread[at[k]] = ZERO
    for k in range(stored):
        # What was kept of both is there already.
        left = spread[at_tau[k]]
        spread[at_tau[k]] = ZERO
        at[total], u[total], d[total] = at_tau[k], ZERO, left
        total += left != ZERO
    return total


@loop
def add_at(theta: int, dtype: int, places: int, merged: int, count: int) -> None:
    """Add to the weights at some places of a block, each rounded once."""
    at, y = int32(places, count), fp32(merged, count)
    if dtype == FP32:
        x = fp32(theta, BLOCK)
        for k in range(count):
            x[at[k]] = add_one(x[at[k]], y[k])
    elif dtype == BF16:
        bits = uint16(theta, BLOCK)
        for k in range(count):
            bits[at[k]] = nearest_bf16(as_bits(add_one(from_bf16(bits[at[k]]), y[k])))
    else:
        bits = uint16(theta, BLOCK)
        for k in range(count):
            bits[at[k]] = to_half(add_one(from_half(bits[at[k]]), y[k]))
