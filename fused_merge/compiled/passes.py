"""The passes of a step over the blocks of many tensors; each call does a range of them in one thread.

A pass goes over the tensors of `numbers`, rows of the tables; block b of tensor `numbers[k]` is block `firsts[k] + b`.

Bytes per element, all fp32: `step_pass` reads theta 4, g 4, m 4, v 4 and writes theta 4, m 4, v 4: 28.

- tau adds 4 (fp32) or 2 (bf16, fp16) when dense; stored sparse 1/8 + 4/1024 and 2 or 4 for each kept value.
- Where few elements are kept, theta is read and written by lines of 64 bytes that hold one: at p = 0.01 for u and for tau
  2.2 of its 8 bytes.
- A ranked F: `search_pass` reads g, m, v and writes m, v and 6 for each element near or above the last threshold;
  `finish_pass` reads these and touches theta as above. With 16-bit moments, masters, step-K, statistics, or where much is
  kept, `search_pass` reads g, m, v and writes 4 for each element near the threshold, and `step_pass` is a whole one.
- Projection over tensors: `products_pass` reads g 4 and tau 4 (for the update g, m, v and tau). Over rows: nothing, since
  a row that was added up is still in a cache when it is stepped.
"""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import memory, merge_stats, projection, search, sparse, step
from fused_merge.compiled.arithmetic import ZERO
from fused_merge.compiled.jit import inlined, jit
from fused_merge.compiled.layout import ENTRY, KEPT, LARGEST, MERGED, SCALAR, SOFT_THRESHOLD
from fused_merge.compiled.memory import BLOCK


@inlined
def _first(firsts, block):
    return np.searchsorted(firsts, block, side="right") - 1


@inlined
def _works(t, s):
    """Return whether a step does anything to a tensor: not at an overflow, nor between merges of another's steps."""
    return s[SCALAR.advances] != ZERO and (t[ENTRY.grad] != 0 or s[SCALAR.merges] * s[SCALAR.moves] != ZERO)


@inlined
def _merges(t, s):
    """Return whether a step adds something of tau."""
    return s[SCALAR.advances] * s[SCALAR.moves] != ZERO and (t[ENTRY.anchor] == 0 or s[SCALAR.merges] != ZERO)


@jit
def read_steps(table, out):
    """Read the step count of every tensor; fp32."""
    for i in range(len(table)):
        out[i] = memory.floats(table[i, ENTRY.step], 1)[0]


@jit
def step_pass(table, scalars, kths, numbers, firsts, start, stop, scratch, products, counts):
    """Step blocks `start` to `stop`.

    Args:
        table: int64 `[T, ...]`, of `TensorEntry`.
        scalars: fp32 `[T, ...]`, of `Scalars`.
        kths: int32 `[T]`, the patterns of the thresholds of a ranked F.
        numbers, firsts: int64, as the module says.
        start, stop: which blocks.
        scratch: of the thread.
        products: fp32 `[blocks, 4]`, for statistics: written.
        counts: int64 `[T, 6]` of the thread, the same: added to.
    """
    scratch.row[0] = -1
    k = _first(firsts, start)
    for block in range(start, stop):
        while block >= firsts[k + 1]:
            k += 1
        index, base = numbers[k], (block - firsts[k]) * BLOCK
        t, s = table[index], scalars[index]
        if not _works(t, s):
            continue
        count = min(BLOCK, t[ENTRY.numel] - base)
        if t[ENTRY.skips] != 0:
            step.step_kept(t, index, s, base, count, scratch)
            continue
        u, kept, tau, merged = step.step_block(t, index, s, base, count, kths[index], scratch)
        if t[ENTRY.stats] != 0 and _merges(t, s):
            merge_stats.add_up(t, s, u, kept, tau, merged, scratch, products[block], counts[index])


@jit
def products_pass(table, scalars, numbers, firsts, start, stop, scratch, out):
    """Write <x, tau> and <tau, tau> of blocks, fp32 `[blocks, 2]`; here blocks are those of rows, one after the other."""
    k = _first(firsts, start)
    for block in range(start, stop):
        while block >= firsts[k + 1]:
            k += 1
        index = numbers[k]
        t, s = table[index], scalars[index]
        length = t[ENTRY.row_length]
        row, inside = divmod(block - firsts[k], (length + BLOCK - 1) // BLOCK)
        base, count = row * length + inside * BLOCK, min(BLOCK, length - inside * BLOCK)
        x = step.to_project(t, index, s, base, count, scratch)
        tau = projection.load_tau_dense(t, base, count, scratch)
        projection.products(x, tau, scratch, out[block])


@jit
def search_pass(
    table, scalars, hows, lows, lasts, numbers, firsts, start, stop, scratch, at, end,
    values, places, parts, own_firsts, totals,
):  # fmt: skip
    """List what lies in the window around the last threshold, and count what lies above; return where the list ends.

    Args:
        table, scalars, numbers, firsts, start, stop, scratch: as for `step_pass`.
        hows: int64 `[T]`, how each tensor's u is found.
        lows, lasts: int32 `[T]`, the window: patterns from here to here.
        at, end: which part of the list this thread has.
        values, places, parts, own_firsts: `thresholds.List`; written.
        totals: int64 `[T, 3]` of the thread: how many lie above, how many are listed, how many blocks did not fit; added
            to.
    """
    scratch.row[0] = -1
    k = _first(firsts, start)
    for block in range(start, stop):
        while block >= firsts[k + 1]:
            k += 1
        index, number = numbers[k], block - firsts[k]
        t, s, how, base = table[index], scalars[index], hows[index], number * BLOCK
        part = parts[own_firsts[index] + number]
        part[0], part[1] = at, 0
        merges = _merges(t, s)
        if not _works(t, s) or not (merges or how == step.ADVANCE):
            continue
        count = min(BLOCK, t[ENTRY.numel] - base)
        u = step.find_update(t, index, s, base, count, how, scratch)
        if how == step.ADVANCE:
            step.decay_in_place(t, s, base, count)
        if not merges:
            continue
        if at + BLOCK > end:
            part[1] = -1
            totals[index, 2] += 1
            continue
        listed, over = search.window(u, lows[index], lasts[index], scratch, values[at:end], places[at:end])
        part[1] = listed
        totals[index, 0] += over
        totals[index, 1] += listed
        at += listed
    return at


@jit
def count_pass(table, scalars, hows, lows, shift, numbers, firsts, start, stop, scratch, counts):
    """Count the patterns of u in 256 bins of 2^shift from `lows` on, int64 `[numbers, 256]` of the thread: added to."""
    scratch.row[0] = -1
    k = _first(firsts, start)
    for block in range(start, stop):
        while block >= firsts[k + 1]:
            k += 1
        index, base = numbers[k], (block - firsts[k]) * BLOCK
        t, s = table[index], scalars[index]
        if _works(t, s) and _merges(t, s):
            count = min(BLOCK, t[ENTRY.numel] - base)
            u = step.find_update(t, index, s, base, count, hows[index], scratch)
            search.count(u, lows[k], shift, counts[k])


@jit
def finish_pass(
    table, scalars, kths, numbers, firsts, start, stop, scratch, values, places, parts, own_firsts
):
    """Add what is kept of what `search_pass` has listed, and of tau; the moments have advanced."""
    k = _first(firsts, start)
    for block in range(start, stop):
        while block >= firsts[k + 1]:
            k += 1
        index, number = numbers[k], block - firsts[k]
        t, s, base = table[index], scalars[index], number * BLOCK
        if not (_works(t, s) and _merges(t, s)):
            continue
        count = min(BLOCK, t[ENTRY.numel] - base)
        kept_places, tau_places, room = scratch.places[0], scratch.places[1], scratch.rows[KEPT]
        first, stored = sparse.tau_places(t, base, count, tau_places)
        at, listed = parts[own_firsts[index] + number]
        own_values, own_places = values[at : at + listed], places[at : at + listed]
        if listed < 0:
            # It did not fit.
            u = step.find_update(t, index, s, base, count, step.AGAIN, scratch)
            listed, _ = search.window(u, kths[index], LARGEST, scratch, scratch.rows[MERGED], scratch.bits)
            own_values, own_places = scratch.rows[MERGED][:listed], scratch.bits[:listed]
        shrinks = t[ENTRY.sparsify] == SOFT_THRESHOLD
        kept = search.kept(own_values, own_places, kths[index], shrinks, room, kept_places)
        step.prefetch_weights(t, base, kept_places[:kept])
        step.prefetch_weights(t, base, tau_places[:stored])
        step.touch(t, s, base, kept_places[:kept], room[:kept], first, tau_places[:stored], scratch)


@jit
def select_pass(ranks, numbers, firsts, start, stop, values, places, parts, own_firsts, kths):
    """Write the pattern of what has a rank among the elements listed, for tensors `start` to `stop` of `numbers`."""
    for k in range(start, stop):
        index, first = numbers[k], own_firsts[numbers[k]]
        if ranks[index] > 0:
            kths[index] = search.select(values, parts[first : first + firsts[k + 1] - firsts[k]], ranks[index])


@jit
def count_listed_pass(lows, shift, numbers, firsts, start, stop, values, places, parts, own_firsts, counts):
    """Count as `count_pass` does, of what is listed."""
    k = _first(firsts, start)
    for block in range(start, stop):
        while block >= firsts[k + 1]:
            k += 1
        at, listed = parts[own_firsts[numbers[k]] + block - firsts[k]]
        search.count(values[at : at + listed], lows[k], shift, counts[k])


@jit
def anchors_pass(table, scalars):
    """Let the decay since the last merge of step-K go on, or begin anew."""
    for i in range(len(table)):
        t, s = table[i], scalars[i]
        if t[ENTRY.anchor_decay] != 0 and s[SCALAR.advances] * s[SCALAR.moves] != ZERO:
            decay = memory.floats(t[ENTRY.anchor_decay], 1)
            decay[0] = 1.0 if s[SCALAR.merges] != ZERO else decay[0] * s[SCALAR.decay]
