"""Projection of a block onto the reference delta, and the inner products that it needs."""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import arithmetic, memory, sums
from fused_merge.compiled.jit import jit
from fused_merge.compiled.layout import (
    ENTRY,
    GRAD,
    ON_UPDATE,
    ONTO,
    OVER_ROWS,
    PRODUCT,
    PROJECTS,
    SCALAR,
    SUMS,
    TAU_DENSE,
    X,
)
from fused_merge.compiled.memory import BLOCK


@jit
def projects(t, on_update):
    """Return whether the gradient, or the update, of a tensor is projected."""
    return t[ENTRY.project] & PROJECTS != 0 and (t[ENTRY.project] & ON_UPDATE != 0) == on_update


@jit
def load_tau_dense(t, base, count, scratch):
    """Return what something is projected onto, of a block."""
    return memory.load(t[ENTRY.tau_dense], t[ENTRY.tau_dense_dtype], base, count, scratch.rows[TAU_DENSE])


@jit
def products(x, tau, scratch, out):
    """Write <x, tau> and <tau, tau> of at most a block."""
    room, other = scratch.rows[PRODUCT], scratch.rows[SUMS]
    out[0] = sums.inner_product(x, tau, room, other)
    out[1] = sums.inner_product(tau, tau, room, other)


@jit
def row_products(t, s, row, scratch, out):
    """Write <g, tau> and <tau, tau> of a row of the gradient."""
    start, end, block = row * t[ENTRY.row_length], (row + 1) * t[ENTRY.row_length], 0
    pair = np.empty(2, np.float32)
    for base in range(start, end, BLOCK):
        count = min(BLOCK, end - base)
        g = memory.load(t[ENTRY.grad], t[ENTRY.grad_dtype], base, count, scratch.rows[GRAD])
        tau = load_tau_dense(t, base, count, scratch)
        x = scratch.rows[X][:count]
        arithmetic.scaled(g, s[SCALAR.grad_factor], x)
        products(x, tau, scratch, pair)
        scratch.nodes[0, block] = pair[0]
        scratch.nodes[1, block] = pair[1]
        block += 1
    for k in range(2):
        out[k] = sums.tree_sum(scratch.nodes[k, :block], scratch.rows[SUMS])


@jit
def project(t, index, s, base, x, scratch, out):
    """Write x, a block of a gradient or an update from element `base` on, projected."""
    ascent = t[ENTRY.project] & ON_UPDATE == 0
    if t[ENTRY.project] & OVER_ROWS == 0:
        tau = load_tau_dense(t, base, len(x), scratch)
        _project(t, x, tau, memory.floats(t[ENTRY.along], 2), ascent, out)
        return
    length, end = t[ENTRY.row_length], base + len(x)
    for row in range(base // length, (end - 1) // length + 1):
        along = scratch.along
        if t[ENTRY.along] != 0:
            along = memory.floats(t[ENTRY.along] + 8 * row, 2)
        elif scratch.row[0] != index or scratch.row[1] != row:
            row_products(t, s, row, scratch, along)
            scratch.row[0] = index
            scratch.row[1] = row
        first, last = max(row * length, base), min((row + 1) * length, end)
        tau = load_tau_dense(t, first, last - first, scratch)
        _project(t, x[first - base : last - base], tau, along, ascent, out[first - base : last - base])


@jit
def _project(t, x, tau, along, ascent, out):
    if t[ENTRY.project] & ONTO:
        strength = memory.as_float(np.uint32(t[ENTRY.strength]))
        rest = memory.as_float(np.uint32(t[ENTRY.rest]))
        arithmetic.onto(x, tau, along, strength, rest, out)
    else:
        arithmetic.remove_conflict(x, tau, along, ascent, out)
