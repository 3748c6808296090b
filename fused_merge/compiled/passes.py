"""The passes of a step over the blocks of many tensors: tasks, of which every thread does some blocks.

Block b of the tensor in row `numbers[k]` of the tables is block `firsts[k] + b` of a pass.

Bytes per element, all fp32: `step_pass` reads theta 4, g 4, m 4, v 4 and writes theta 4, m 4, v 4: 28.

- tau adds 4 (fp32) or 2 (bf16, fp16) when dense; stored sparse 1/8 + 4/1024 and 2 or 4 for each kept value.
- Where few elements are kept, theta is read and written by lines of 64 bytes that hold one: at p = 0.01 for u and for
  tau 2.2 of its 8 bytes.
- A ranked F: `search_pass` reads g, m, v and writes m, v and 6 for each element near or above the last threshold;
  `finish_pass` reads these and touches theta as above. With 16-bit moments, masters, step-K, statistics, or where much
  is kept, `search_pass` reads g, m, v and writes 4 for each element near the threshold, and `step_pass` is a whole one.
- Projection over tensors: `products_pass` reads g 4 and tau 4 (for the update g, m, v and tau). Over rows: nothing,
  since a row that was added up is still in a cache when it is stepped.
"""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import merge_stats, projection, search, sparse, step
from fused_merge.compiled.arithmetic import ZERO
from fused_merge.compiled.jit import inlined, task
from fused_merge.compiled.layout import ENTRIES, ENTRY, LARGEST, SCALAR, SCALARS, SOFT_THRESHOLD
from fused_merge.compiled.memory import BLOCK, fetch_add, fp32, int32, int64
from fused_merge.compiled.scratch import BITS, KEPT, MERGED, PLACES, ROW_OF_ALONG, TAU_PLACES, row
from fused_merge.compiled.threads import TASK, TASKS, begin, locate, take
from fused_merge.eager.kth_largest import BINS

# Elements of a list that a thread takes at once.
PIECE = 16 * BLOCK


@inlined
def _told(task):
    return int64(task, TASKS)


@inlined
def _begin(task):
    """Return the number and the room of this thread, in which no products of a row are known yet."""
    thread, scratch = begin(task)
    int64(row(scratch, ROW_OF_ALONG), 2)[0] = -1
    return thread, scratch


@inlined
def _locate(a, block, k):
    """Return what `locate` does, with the row of the tensor between the two."""
    k, number = locate(a, block, k)
    return k, int64(a[TASK.numbers] + 8 * k, 1)[0], number


@inlined
def _row(a, index):
    """Return the rows of a tensor in the tables."""
    return int64(a[TASK.table] + 8 * ENTRIES * index, ENTRIES), fp32(a[TASK.scalars] + 4 * SCALARS * index, SCALARS)


@inlined
def _works(t, s):
    """Return whether a step does anything to a tensor: not at an overflow, nor between merges of another's steps."""
    return s[SCALAR.advances] != ZERO and (t[ENTRY.grad] != 0 or s[SCALAR.merges] * s[SCALAR.moves] != ZERO)


@inlined
def _merges(t, s):
    """Return whether a step adds something of tau."""
    return s[SCALAR.advances] * s[SCALAR.moves] != ZERO and (t[ENTRY.anchor] == 0 or s[SCALAR.merges] != ZERO)


@inlined
def _part(a, index, number):
    """Return where the list of a block begins, and how long it is."""
    return int64(a[TASK.parts] + 16 * (int64(a[TASK.own_firsts] + 8 * index, 1)[0] + number), 2)


@task
def step_pass(task: int) -> None:
    """Step blocks. Statistics: write `products`, fp32 `[blocks, 4]`, and add to `counts`, int64 `[threads, T, 6]`."""
    a, (thread, scratch), k = _told(task), _begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, index, number = _locate(a, block, k)
            (t, s), base = _row(a, index), number * BLOCK
            if not _works(t, s):
                continue
            count = min(BLOCK, t[ENTRY.numel] - base)
            if t[ENTRY.skips] != 0:
                step.step_kept(t, index, s, base, count, scratch)
                continue
            if step.is_linear(t, s):
                step.step_linear(t, index, s, base, count, scratch)
                continue
            kth = int32(a[TASK.kths] + 4 * index, 1)[0]
            u, kept, tau, merged = step.step_block(t, index, s, base, count, kth, scratch)
            if t[ENTRY.stats] != 0 and _merges(t, s):
                products = a[TASK.products] + 4 * merge_stats.PRODUCTS * block
                counts = a[TASK.counts] + 8 * merge_stats.COUNTS * (thread * a[TASK.tensors] + index)
                merge_stats.add_up(t, s, u, kept, tau, merged, count, scratch, products, counts)


@task
def products_pass(task: int) -> None:
    """Write `products`, <x, tau> and <tau, tau>, fp32 `[2, blocks]`; here blocks are those of rows, row by row."""
    a, (_, scratch), k = _told(task), _begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, index, number = _locate(a, block, k)
            t, s = _row(a, index)
            length = t[ENTRY.row_length]
            blocks = (length + BLOCK - 1) // BLOCK
            inside = number % blocks * BLOCK
            base, count = number // blocks * length + inside, min(BLOCK, length - inside)
            x, factor = step.to_project(t, index, s, base, count, scratch)
            dot, of_tau = projection.products(t, base, x, factor, count, scratch)
            fp32(a[TASK.products] + 4 * block, 1)[0] = dot
            fp32(a[TASK.products] + 4 * (a[TASK.blocks] + block), 1)[0] = of_tau


@task
def search_pass(task: int) -> None:
    """List what lies in the window around the last threshold, and advance the moments where `hows` says so.

    Threads take pieces of the list, `values` and `places`, from `listed` on. Writes `parts`, where the list of each
    block begins and how long it is, -1 where it did not fit. Adds to `counts`, int64 `[threads, T, 3]`: how many lie
    above the window, how many are listed, how many blocks did not fit.
    """
    a, (thread, scratch), k = _told(task), _begin(task), 0
    at = end = 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, index, number = _locate(a, block, k)
            (t, s), base, how = _row(a, index), number * BLOCK, int64(a[TASK.hows] + 8 * index, 1)[0]
            part, merges = _part(a, index, number), _merges(t, s)
            part[0], part[1] = 0, 0
            if not _works(t, s) or not (merges or how == step.ADVANCE):
                continue
            count = min(BLOCK, t[ENTRY.numel] - base)
            u = step.find_update(t, index, s, base, count, how, scratch)
            if how == step.ADVANCE:
                step.decay_in_place(t, s, base, count)
            if not merges:
                continue
            totals = int64(a[TASK.counts] + 24 * (thread * a[TASK.tensors] + index), 3)
            if at + BLOCK > end:
                at = fetch_add(a[TASK.listed], PIECE)
                end = min(at + PIECE, a[TASK.room])
            if at + BLOCK > end:
                part[1] = -1
                totals[2] += 1
                continue
            low, last = int32(a[TASK.lows] + 4 * index, 1)[0], int32(a[TASK.lasts] + 4 * index, 1)[0]
            values, places = a[TASK.values] + 4 * at, a[TASK.places] + 2 * at
            part[0] = at
            part[1], above = search.window(u, low, last, count, scratch, values, places)
            totals[0] += above
            totals[1] += part[1]
            at += part[1]


@task
def count_pass(task: int) -> None:
    """Add to `counts`, int64 `[threads, N, 256]`: how many patterns of u lie in bins of 2^shift, from `bins` on."""
    a, (thread, scratch), k = _told(task), _begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, index, number = _locate(a, block, k)
            (t, s), base, how = _row(a, index), number * BLOCK, int64(a[TASK.hows] + 8 * index, 1)[0]
            if _works(t, s) and _merges(t, s):
                count = min(BLOCK, t[ENTRY.numel] - base)
                u = step.find_update(t, index, s, base, count, how, scratch)
                _count(a, thread, k, u, count)


@task
def count_listed_pass(task: int) -> None:
    """Add to `counts` as `count_pass` does, of what is listed."""
    a, (thread, _), k = _told(task), begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, index, number = _locate(a, block, k)
            part = _part(a, index, number)
            _count(a, thread, k, a[TASK.values] + 4 * part[0], part[1])


@inlined
def _count(a, thread, k, x, count):
    out = a[TASK.counts] + 8 * BINS * (thread * a[TASK.tensors] + a[TASK.first] + k)
    search.count_patterns(x, count, int64(a[TASK.bins] + 8 * k, 1)[0], a[TASK.shift], out)


@task
def select_pass(task: int) -> None:
    """Write `kths`, the patterns of what has `ranks` among the elements listed; a block here is a tensor."""
    a = _told(task)
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            index = int64(a[TASK.numbers] + 8 * block, 1)[0]
            rank, t = int64(a[TASK.ranks] + 8 * index, 1)[0], _row(a, index)[0]
            if rank > 0:
                blocks = (t[ENTRY.numel] + BLOCK - 1) // BLOCK
                kth = search.select(a[TASK.values], _part(a, index, 0).ctypes.data, blocks, rank)
                int32(a[TASK.kths] + 4 * index, 1)[0] = kth


@task
def finish_pass(task: int) -> None:
    """Add what is kept of what `search_pass` has listed, and of tau; the moments have advanced."""
    a, (_, scratch), k = _told(task), _begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, index, number = _locate(a, block, k)
            (t, s), base, kth = _row(a, index), number * BLOCK, int32(a[TASK.kths] + 4 * index, 1)[0]
            if not (_works(t, s) and _merges(t, s)):
                continue
            count, part = min(BLOCK, t[ENTRY.numel] - base), _part(a, index, number)
            kept, kept_places, tau_places = row(scratch, KEPT), row(scratch, PLACES), row(scratch, TAU_PLACES)
            first, stored = sparse.tau_places(t, base, count, tau_places)
            values, places, listed = a[TASK.values] + 4 * part[0], a[TASK.places] + 2 * part[0], part[1]
            if listed < 0:
                # It did not fit.
                u = step.find_update(t, index, s, base, count, step.AGAIN, scratch)
                values, places = row(scratch, MERGED), row(scratch, BITS)
                listed = search.window(u, kth, LARGEST, count, scratch, values, places)[0]
            shrinks = int(t[ENTRY.sparsify] == SOFT_THRESHOLD)
            found = search.keep(values, places, listed, kth, shrinks, kept, kept_places)
            step.touch(t, s, base, kept_places, kept, found, first, tau_places, stored, scratch)


@task
def read_steps(task: int) -> None:
    """Write `products`, the step counts of all tensors, fp32 `[T]`."""
    a = _told(task)
    for index in range(a[TASK.tensors]):
        fp32(a[TASK.products] + 4 * index, 1)[0] = fp32(_row(a, index)[0][ENTRY.step], 1)[0]


@task
def count_steps(task: int) -> None:
    """Count the step of all tensors, but at an overflow; the decay since the last merge of step-K goes on or begins."""
    a = _told(task)
    for index in range(a[TASK.tensors]):
        t, s = _row(a, index)
        if s[SCALAR.advances] == ZERO:
            continue
        fp32(t[ENTRY.step], 1)[0] = s[SCALAR.step]
        if t[ENTRY.anchor_decay] != 0 and s[SCALAR.moves] != ZERO:
            decay = fp32(t[ENTRY.anchor_decay], 1)
            decay[0] = np.float32(1) if s[SCALAR.merges] != ZERO else decay[0] * s[SCALAR.decay]
