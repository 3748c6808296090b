"""Projection of a block onto the reference delta, and the inner products that it needs."""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import arithmetic, memory, sums
from fused_merge.compiled.arithmetic import ONE, ZERO
from fused_merge.compiled.jit import inlined, jit
from fused_merge.compiled.layout import ENTRY, ON_UPDATE, ONTO, OVER_ROWS, PROJECTS, SCALAR
from fused_merge.compiled.memory import BLOCK, fp32, int64
from fused_merge.compiled.scratch import (
    ALONG,
    NODES,
    NODES_OF_TAU,
    PRODUCT,
    ROOM,
    ROW_OF_ALONG,
    SCALED,
    SUMS,
    TAU_DENSE,
    row,
)


@inlined
def projects(t, on_update):
    """Return whether the gradient, or the update, of a tensor is projected."""
    return t[ENTRY.project] & PROJECTS != 0 and (t[ENTRY.project] & ON_UPDATE != 0) == on_update


@inlined
def changes_gradient(t):
    """Return whether the projection of the gradient changes anything, as far as that is known of the whole tensor."""
    if not projects(t, False):
        return False
    if t[ENTRY.project] & OVER_ROWS != 0:
        return True
    along = fp32(t[ENTRY.along], 2)
    return along[1] > ZERO and (t[ENTRY.project] & ONTO != 0 or along[0] > ZERO)


@jit
def products(t, base, x, factor, count, scratch):
    """Return <s*x, tau> and <tau, tau> of at most a block from element `base` on."""
    tau = memory.load(t, ENTRY.tau_dense, base, count, row(scratch, TAU_DENSE))
    room, other = row(scratch, PRODUCT), row(scratch, SUMS)
    dot = sums.inner_product(x, tau, factor, room, other, count)
    return dot, sums.inner_product(tau, tau, ONE, room, other, count)


@jit
def _row_products(t, s, number, scratch):
    """Write <g, tau> and <tau, tau> of a row of the gradient to ALONG."""
    start, end, block = number * t[ENTRY.row_length], (number + 1) * t[ENTRY.row_length], 0
    nodes, of_tau = fp32(row(scratch, NODES), ROOM), fp32(row(scratch, NODES_OF_TAU), ROOM)
    for base in range(start, end, BLOCK):
        count = min(BLOCK, end - base)
        g = memory.load(t, ENTRY.grad, base, count, row(scratch, SCALED))
        nodes[block], of_tau[block] = products(t, base, g, s[SCALAR.grad_factor], count, scratch)
        block += 1
    along = fp32(row(scratch, ALONG), 2)
    along[0] = sums.tree_sum(row(scratch, NODES), row(scratch, SUMS), block)
    along[1] = sums.tree_sum(row(scratch, NODES_OF_TAU), row(scratch, SUMS), block)


@jit
def project(t, index, s, base, x, factor, count, scratch, out):
    """Write s*x, `count` elements of a gradient or an update from element `base` on, projected."""
    if t[ENTRY.project] & OVER_ROWS == 0:
        _project(t, base, x, factor, t[ENTRY.along], out, count, scratch)
        return
    length, end, last = t[ENTRY.row_length], base + count, int64(row(scratch, ROW_OF_ALONG), 2)
    for number in range(base // length, (end - 1) // length + 1):
        along = t[ENTRY.along] + 8 * number
        if t[ENTRY.along] == 0:
            along = row(scratch, ALONG)
            if last[0] != index or last[1] != number:
                _row_products(t, s, number, scratch)
                last[0], last[1] = index, number
        first, stop = max(number * length, base), min((number + 1) * length, end)
        before = 4 * (first - base)
        _project(t, first, x + before, factor, along, out + before, stop - first, scratch)


@inlined
def _project(t, base, x, factor, along, out, count, scratch):
    tau = memory.load(t, ENTRY.tau_dense, base, count, row(scratch, TAU_DENSE))
    if t[ENTRY.project] & ONTO != 0:
        strength = memory.as_float(np.uint32(t[ENTRY.strength]))
        arithmetic.onto(x, factor, tau, along, strength, memory.as_float(np.uint32(t[ENTRY.rest])), out, count)
    else:
        arithmetic.remove_conflict(x, factor, tau, along, int(t[ENTRY.project] & ON_UPDATE == 0), out, count)
