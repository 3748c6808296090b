"""The equations of a step over the elements of a block, each beside that of `fused_merge.eager`.

Every loop reads and writes slices by number, so that it becomes vector instructions; what it reads in the dtype of the
computation may lie in a tensor or in scratch.
"""

from __future__ import annotations

import numpy as np

from fused_merge.compiled.jit import inlined, jit
from fused_merge.compiled.layout import LINEAR, SCALAR, SIGN_REFERENCE
from fused_merge.eager.projection import RESIDUE

ZERO, ONE = np.float32(0), np.float32(1)
_RESIDUE = np.float32(RESIDUE)


# --- adamw.py


@inlined
def _update(m, v, step_size, inv_sqrt_bias2, eps):
    return -(step_size * m) / (np.sqrt(v) * inv_sqrt_bias2 + eps)


@jit
def advance(g, factor, m, v, u, s):
    """m = b1*m + (1 - b1)*g, v = b2*v + (1 - b2)*g^2 in place, and u; g is to be multiplied by `factor`."""
    beta1, beta2, step_size = s[SCALAR.beta1], s[SCALAR.beta2], s[SCALAR.step_size]
    inv_sqrt_bias2, eps = s[SCALAR.inv_sqrt_bias2], s[SCALAR.eps]
    rest1, rest2 = s[SCALAR.one_minus_beta1], s[SCALAR.one_minus_beta2]
    for j in range(len(u)):
        x = factor * g[j]
        m_now = beta1 * m[j] + rest1 * x
        v_now = beta2 * v[j] + rest2 * (x * x)
        m[j] = m_now
        v[j] = v_now
        u[j] = _update(m_now, v_now, step_size, inv_sqrt_bias2, eps)


@jit
def peek(g, factor, m, v, u, s):
    """The u of `advance`, with the moments left as they are."""
    beta1, beta2, step_size = s[SCALAR.beta1], s[SCALAR.beta2], s[SCALAR.step_size]
    inv_sqrt_bias2, eps = s[SCALAR.inv_sqrt_bias2], s[SCALAR.eps]
    rest1, rest2 = s[SCALAR.one_minus_beta1], s[SCALAR.one_minus_beta2]
    for j in range(len(u)):
        x = factor * g[j]
        m_now = beta1 * m[j] + rest1 * x
        v_now = beta2 * v[j] + rest2 * (x * x)
        u[j] = _update(m_now, v_now, step_size, inv_sqrt_bias2, eps)


@jit
def update_again(m, v, u, s):
    """u from moments that have advanced."""
    step_size, inv_sqrt_bias2, eps = s[SCALAR.step_size], s[SCALAR.inv_sqrt_bias2], s[SCALAR.eps]
    for j in range(len(u)):
        u[j] = _update(m[j], v[j], step_size, inv_sqrt_bias2, eps)


@jit
def scaled(x, factor, out):
    """factor * x."""
    for j in range(len(out)):
        out[j] = factor * x[j]


@jit
def difference(x, y, out):
    """x - y."""
    for j in range(len(out)):
        out[j] = x[j] - y[j]


@jit
def since_anchor(start, decay, u, anchor, anchor_decay, since):
    """The update since the last merge of step-K, start*decay + u - c*anchor; `start` becomes c*anchor."""
    for j in range(len(u)):
        origin = anchor_decay * anchor[j]
        since[j] = start[j] * decay + u[j] - origin
        start[j] = origin


@jit
def decay(theta, factor):
    """decay*theta, in place."""
    for j in range(len(theta)):
        theta[j] = theta[j] * factor


# --- projection.py


@inlined
def _coefficient(along):
    dot, norm = along[0], along[1]
    return dot / norm if norm > ZERO else ZERO


@jit
def remove_conflict(x, tau, along, ascent, out):
    """x without its component along tau, where the step goes against it."""
    dot, c = along[0], _coefficient(along)
    if along[1] > ZERO and (dot > ZERO if ascent else dot < ZERO):
        for j in range(len(out)):
            component = c * tau[j]
            rest = x[j] - component
            out[j] = ZERO if abs(rest) < _RESIDUE * (abs(x[j]) + abs(component)) else rest
    else:
        for j in range(len(out)):
            out[j] = x[j]


@jit
def onto(x, tau, along, strength, rest, out):
    """(1 - s)*x + s*c*tau."""
    c = _coefficient(along)
    if along[1] > ZERO:
        for j in range(len(out)):
            out[j] = rest * x[j] + strength * (c * tau[j])
    else:
        for j in range(len(out)):
            out[j] = x[j]


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


@jit
def consensus(kind, u, tau, update_weight, tau_weight, out):
    """⊕ of the elements of a block."""
    if kind == LINEAR:
        for j in range(len(out)):
            out[j] = update_weight * u[j] + tau_weight * tau[j]
    elif kind == SIGN_REFERENCE:
        for j in range(len(out)):
            out[j] = consensus_one(SIGN_REFERENCE, u[j], tau[j], update_weight, tau_weight)
    else:
        for j in range(len(out)):
            out[j] = consensus_one(kind, u[j], tau[j], update_weight, tau_weight)


# --- merging_adamw.py


@inlined
def add_one(start, merged):
    """What adds nothing changes no bit."""
    return start if merged == ZERO else start + merged


@jit
def add(start, merged, out):
    """start + merged."""
    for j in range(len(out)):
        out[j] = add_one(start[j], merged[j])


@jit
def decay_and_add(theta, merged, decay):
    """decay*theta + merged, in place."""
    for j in range(len(theta)):
        theta[j] = add_one(decay * theta[j], merged[j])


@jit
def decay_and_merge(theta, u, tau, update_weight, tau_weight, decay):
    """decay*theta + (u ⊕ tau), linear and in place."""
    for j in range(len(theta)):
        theta[j] = add_one(decay * theta[j], update_weight * u[j] + tau_weight * tau[j])


# --- sparsify.py


@jit
def keep_from(x, kth, out):
    """x where its magnitude is at least that of the pattern `kth`."""
    patterns = x.view(np.int32)
    for j in range(len(out)):
        out[j] = x[j] if (patterns[j] & 0x7FFFFFFF) >= kth else ZERO


@inlined
def shrink_one(x, threshold):
    """x shrunk by a threshold; NaN stays NaN."""
    shrunk = (x - threshold if x > ZERO else x + threshold) if abs(x) > threshold else ZERO
    return x if x != x else shrunk


@jit
def shrink_by(x, threshold, out):
    """x shrunk by a threshold."""
    for j in range(len(out)):
        out[j] = shrink_one(x[j], threshold)
