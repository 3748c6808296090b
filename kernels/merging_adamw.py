"""theta += F(u) ⊕ F(tau) inside one AdamW step, for many tensors in one launch.

    g, m, v, theta, tau -> fp32
    g projected onto tau;  m = b1*m + (1 - b1)*g;  v = b2*v + (1 - b2)*g^2
    u = -(lr/bc1)*m / (sqrt(v)/sqrt(bc2) + eps);  u projected onto tau
    theta = theta*(1 - lr*wd) + (F(u) ⊕ F(tau))     rounded once

Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1. Twin: `fused_merge/eager/merging_adamw.py`.

Bytes per element, all fp32: reads theta 4, g 4, m 4, v 4; writes theta 4, m 4, v 4: 28.

- tau adds 4 (fp32) or 2 (bf16, fp16) when dense; stored sparse 1/8 + 4/1024 and 2 or 4 for each kept value.
- Where few elements are kept and nothing decays, theta is read and written only in groups of eight neighbours that
  hold one: of its 8 bytes 1.2 remain at p = 0.01 for u and for tau.
- Random masks cost arithmetic and no bytes.
- Ranked F (the k-th largest magnitude): a first pass reads g, m, v and writes m, v, a bit, and a list of what lies near
  the last threshold (20 1/8 and less than 1/8); four rounds read the list; the step reads the bits and, of m and v, the
  groups that hold a marked element, and touches theta as above. Where the last threshold tells nothing each round
  reads m and v whole, 8, and so does the step. With 16-bit moments, step-K or statistics the passes read g, m and v
  instead, and the step is a whole one.
- Projection over tensors: one pass more over g and tau (over g, m, v and tau for the update). Over rows: nothing,
  since a program that owns a row finds it in the cache again.
- Step-K: the anchor is read and written at merges, and only then is tau read.

Contract: tensors are contiguous and of the dtypes that `rows.Build` names.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import access, merge_stats, rows, scalars, sparsify, step, sums

# Blocks of a row that a program can project as it goes.
ROW_BLOCKS = tl.constexpr(256)
# Blocks that a program looks at in one round of a search, before it adds its counts to those of others.
SEARCH_BLOCKS = tl.constexpr(16)


@triton.jit
def locate(programs, tensors, table):
    """What this program works on: the number of its tensor, its row and scalars, and which chunk or row of it."""
    program = programs + 2 * tl.program_id(0)
    index = tl.load(program)
    return (
        index,
        tensors + index * rows.TENSOR_COLUMNS,
        table + index * scalars.COLUMNS,
        tl.load(program + 1).to(tl.int64),
    )


@triton.jit
def advances(scalar):
    """Whether anything moves: an overflow of scaled gradients stops a step on the device."""
    return tl.load(scalar + scalars.ADVANCES) != 0.0


@triton.jit
def merges(scalar, BUILD: tl.constexpr):
    """Whether this step merges."""
    answer = advances(scalar) & (tl.load(scalar + scalars.MOVES) != 0.0)
    if BUILD.ANCHOR is not None:
        answer = answer & (tl.load(scalar + scalars.MERGES) != 0.0)
    return answer


@triton.jit
def products(tensor, scalar, base, inside, BUILD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """<x, tau> and <tau, tau> of a block, for the x that is projected: nodes of the tree."""
    full = step.load_full(tensor, base, inside, BUILD, MASKED, BLOCK)
    x = step.gradient(tensor, scalar, base, inside, BUILD, MASKED, BLOCK)
    if BUILD.PROJECT_ON == "update":
        _, _, x = step.advance(tensor, scalar, x, base, inside, BUILD, MASKED, BLOCK)
        if MASKED:
            # With eps = 0 the u of nothing is not a number.
            x = tl.where(inside, x, 0.0)
    return sums.tree(x * full, BLOCK), sums.tree(full * full, BLOCK)


@triton.jit
def block_products(tensor, scalar, base, left, BUILD: tl.constexpr, BLOCK: tl.constexpr):
    """`products` of up to BLOCK elements."""
    inside = tl.arange(0, BLOCK) < left
    if left >= BLOCK:
        dot, norm = products(tensor, scalar, base, inside, BUILD, False, BLOCK)
    else:
        dot, norm = products(tensor, scalar, base, inside, BUILD, True, BLOCK)
    return dot, norm


@triton.jit
def row_start(row, columns, BUILD: tl.constexpr):
    """The first element of a row, as int64."""
    start = row * columns
    if BUILD.ALIGNED:
        start = tl.multiple_of(start, 8)
    return start


@triton.jit
def row_products(tensor, scalar, start, columns, BUILD: tl.constexpr, BLOCK: tl.constexpr):
    """<x, tau> and <tau, tau> of the row that begins at element `start`."""
    blocks = tl.arange(0, ROW_BLOCKS)
    dots = tl.zeros((ROW_BLOCKS,), tl.float32)
    norms = tl.zeros((ROW_BLOCKS,), tl.float32)
    for block in range(0, tl.cdiv(columns, BLOCK)):
        offset = block * BLOCK
        dot, norm = block_products(tensor, scalar, start + offset, columns - offset, BUILD, BLOCK)
        dots = tl.where(blocks == block, dot, dots)
        norms = tl.where(blocks == block, norm, norms)
    return sums.tree(dots, ROW_BLOCKS), sums.tree(norms, ROW_BLOCKS)


@triton.jit
def project_kernel(
    programs,  # int32 [P, 2]: tensor, and chunk or row
    tensors,  # int64 [T, ...]: `rows.TensorRow`
    table,  # fp32 [T, 16]: `scalars`
    out,  # fp32 [P, 2] block sums, or [R, 2] of all rows; written
    BUILD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<x, tau> and <tau, tau> of what is projected: block sums of the tensor, or those of a row."""
    _, tensor, scalar, chunk = locate(programs, tensors, table)
    if BUILD.PROJECT_ROWS:
        columns = tl.load(tensor + rows.COLUMNS_AT)
        dot, norm = row_products(tensor, scalar, row_start(chunk, columns, BUILD), columns, BUILD, BLOCK)
        at = out + 2 * (tl.load(tensor + rows.COEFFICIENTS_AT) + chunk)
    else:
        base = chunk * BLOCK
        dot, norm = block_products(tensor, scalar, base, tl.load(tensor + rows.NUMEL_AT) - base, BUILD, BLOCK)
        at = out + 2 * tl.program_id(0).to(tl.int64)
    tl.store(at, dot)
    tl.store(at + 1, norm)


@triton.jit
def list_capacity(tensor, BLOCK: tl.constexpr):
    """How many patterns of a tensor fit in its list: one for 32 elements, as many as it has words of marks."""
    return tl.cdiv(tl.load(tensor + rows.NUMEL_AT), BLOCK) * (BLOCK // 32)


@triton.jit
def mark_chunk(
    tensor,
    scalar,
    coefficients,
    shares,
    kth,
    counts,
    words,
    listed,
    capacity,
    base,
    inside,
    BUILD: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mark the elements in or above the window around the last threshold, count them, and list those in it."""
    dot, norm = step.coefficients(tensor, coefficients, base, inside, BUILD, BLOCK)
    rest_share, onto_share = shares
    along = dot, norm, rest_share, onto_share
    full = step.load_full(tensor, base, inside, BUILD, MASKED, BLOCK)
    m, v, u = step.fresh_update(tensor, scalar, full, along, base, inside, BUILD, MASKED, BLOCK)
    if BUILD.RESUMES:
        step.store_moments(tensor, m, v, base, inside, BUILD, MASKED, BLOCK)
    if BUILD.ANCHOR is not None:
        decayed = step.load_weight(tensor, base, inside, BUILD, MASKED, BLOCK) * tl.load(scalar + scalars.DECAY)
        _, u = step.since_anchor(tensor, scalar, decayed, u, base, inside, BUILD, MASKED, BLOCK)
    low, last = sparsify.window(kth)
    pattern = sparsify.pattern(u)
    marked = inside & (pattern >= low)
    above = inside & (pattern > last)
    access.store_bits(marked, words, BLOCK)
    if tl.load(scalar + scalars.MOVES) != 0.0:
        within = (marked & (pattern <= last)).to(tl.int32)
        tl.atomic_add(counts, tl.sum(above.to(tl.int32)).to(tl.int64), sem="relaxed")
        first = tl.atomic_add(counts + 1, tl.sum(within).to(tl.int64), sem="relaxed")
        at = first + (tl.cumsum(within, axis=0) - within)
        tl.store(listed + at, pattern, mask=(within != 0) & (at < capacity))


@triton.jit
def mark_kernel(
    programs,  # int32 [P, 2]: tensor, chunk
    tensors,  # int64 [T, ...]: `rows.TensorRow`
    table,  # fp32 [T, 16]: `scalars`
    coefficients,  # fp32 [T or R, 2]
    thresholds,  # int32 [T]: the patterns of the last thresholds
    counts,  # int64 [T, 256], zeros; written
    words,  # int32: a bit an element, written
    patterns,  # int32, as many: a list for each tensor, written
    rest_share,
    onto_share,
    BUILD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first pass of a ranked F: mark and count, and where the step resumes store the moments."""
    index, tensor, scalar, chunk = locate(programs, tensors, table)
    base = chunk * BLOCK
    left = tl.load(tensor + rows.NUMEL_AT) - base
    inside = tl.arange(0, BLOCK) < left
    kth = tl.load(thresholds + index)
    own_counts = counts + index * sparsify.BINS
    first_word = tl.load(tensor + rows.WORDS_AT)
    own_words = words + first_word + base // 32
    capacity = list_capacity(tensor, BLOCK)
    # At lr = 0 the moments move and nothing is merged.
    if BUILD.RESUMES:
        runs = advances(scalar)
    else:
        runs = merges(scalar, BUILD)
    if runs:
        if left >= BLOCK:
            mark_chunk(
                tensor, scalar, coefficients, (rest_share, onto_share), kth, own_counts, own_words,
                patterns + first_word, capacity, base, inside, BUILD, False, BLOCK,
            )  # fmt: skip
        else:
            mark_chunk(
                tensor, scalar, coefficients, (rest_share, onto_share), kth, own_counts, own_words,
                patterns + first_word, capacity, base, inside, BUILD, True, BLOCK,
            )  # fmt: skip


@triton.jit
def search_kernel(
    tensors,  # int64 [T, ...]: `rows.TensorRow`
    table,  # fp32 [T, 16]: `scalars`
    thresholds,  # int32 [T], written when the search ends
    counts,  # int64 [T, 256], set back to zero
    search,  # int64 [T, 4]: `sparsify`, written
    BUILD: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Narrow the interval that holds each tensor's k-th largest magnitude; one program a tensor."""
    index = tl.program_id(0)
    tensor = tensors + index * rows.TENSOR_COLUMNS
    own = search + index * sparsify.SEARCH_COLUMNS
    own_counts = counts + index * sparsify.BINS
    if merges(table + index * scalars.COLUMNS, BUILD):
        if FIRST:
            k = tl.load(tensor + rows.RANK_AT)
            sparsify.begin_search(own, own_counts, tl.load(thresholds + index), k, list_capacity(tensor, BLOCK))
        else:
            low = sparsify.narrow_search(own, own_counts)
            if LAST:
                tl.store(thresholds + index, low.to(tl.int32))


@triton.jit
def bin_counts(pattern, where, low, last):
    """How many patterns lie in each of the 256 bins from `low` to `last`."""
    sought = where & (pattern >= low) & (pattern <= last)
    bins = tl.where(sought, (pattern - low) >> sparsify.bin_shift(last - low), 0)
    return tl.histogram(bins, sparsify.BINS, mask=sought)


@triton.jit
def count_kernel(
    programs,  # int32 [P, 2]: tensor, chunk of SEARCH_BLOCKS blocks
    tensors,  # int64 [T, ...]: `rows.TensorRow`
    table,  # fp32 [T, 16]: `scalars`
    coefficients,  # fp32 [T or R, 2]
    counts,  # int64 [T, 256], written
    search,  # int64 [T, 4]: `sparsify`
    patterns,  # int32: a list for each tensor
    rest_share,
    onto_share,
    BUILD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One round of a search: count the elements in the 256 bins of the interval."""
    LISTED: tl.constexpr = BLOCK * SEARCH_BLOCKS // 32
    index, tensor, scalar, chunk = locate(programs, tensors, table)
    own = search + index * sparsify.SEARCH_COLUMNS
    if merges(scalar, BUILD):
        low = tl.load(own + sparsify.LOW_AT).to(tl.int32)
        last = tl.load(own + sparsify.LAST_AT).to(tl.int32)
        listed = tl.load(own + sparsify.LISTED_AT)
        if (last > low) & ((listed < 0) | (chunk * LISTED < listed)):
            total = tl.zeros((sparsify.BINS,), tl.int32)
            if listed < 0:
                numel = tl.load(tensor + rows.NUMEL_AT)
                for block in range(SEARCH_BLOCKS):
                    base = (chunk * SEARCH_BLOCKS + block) * BLOCK
                    if base < numel:
                        inside = tl.arange(0, BLOCK) < numel - base
                        dot, norm = step.coefficients(tensor, coefficients, base, inside, BUILD, BLOCK)
                        along = dot, norm, rest_share, onto_share
                        if base + BLOCK <= numel:
                            u = step.update_again(tensor, scalar, along, base, inside, BUILD, False, BLOCK)
                        else:
                            u = step.update_again(tensor, scalar, along, base, inside, BUILD, True, BLOCK)
                        total += bin_counts(sparsify.pattern(u), inside, low, last)
            else:
                at = chunk * LISTED + tl.arange(0, LISTED)
                own_patterns = patterns + tl.load(tensor + rows.WORDS_AT)
                total = bin_counts(tl.load(own_patterns + at, mask=at < listed, other=0), at < listed, low, last)
            bins = tl.arange(0, sparsify.BINS)
            tl.atomic_add(counts + index * sparsify.BINS + bins, total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit
def merging_adamw_kernel(
    programs,  # int32 [P, 2]: tensor, and chunk or row
    tensors,  # int64 [T, ...]: `rows.TensorRow`
    table,  # fp32 [T, 16]: `scalars`
    coefficients,  # fp32 [T or R, 2]
    thresholds,  # int32 [T]: patterns of the k-th largest
    search,  # int64 [T, 4]: `sparsify`
    words,  # int32: marks
    products,  # fp32 [P, 4], written where statistics are collected
    counts,  # int64 [T, 5], the same
    rest_share,
    onto_share,
    BUILD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The step; one program a chunk of BLOCK elements, or a row."""
    index, tensor, scalar, chunk = locate(programs, tensors, table)
    lanes = tl.arange(0, BLOCK)
    kth = 0
    if BUILD.RANKED:
        kth = tl.load(thresholds + index)
    if BUILD.ROW_PROGRAMS:
        if advances(scalar):
            columns = tl.load(tensor + rows.COLUMNS_AT)
            start = row_start(chunk, columns, BUILD)
            dot, norm = row_products(tensor, scalar, start, columns, BUILD, BLOCK)
            along = dot, norm, rest_share, onto_share
            for block in range(0, tl.cdiv(columns, BLOCK)):
                offset = block * BLOCK
                inside = lanes < columns - offset
                if offset + BLOCK <= columns:
                    step.step_chunk(
                        tensor, scalar, along, kth, (products, counts), start + offset,
                        inside, BUILD, False, BLOCK,
                    )  # fmt: skip
                else:
                    step.step_chunk(
                        tensor, scalar, along, kth, (products, counts), start + offset,
                        inside, BUILD, True, BLOCK,
                    )  # fmt: skip
    else:
        base = chunk * BLOCK
        left = tl.load(tensor + rows.NUMEL_AT) - base
        inside = lanes < left
        own_products = products + tl.program_id(0).to(tl.int64) * merge_stats.PRODUCTS
        own_sums = own_products, counts + index * merge_stats.COUNTS
        if BUILD.RESUMES:
            if merges(scalar, BUILD):
                every = sparsify.looks_at_all(search + index * sparsify.SEARCH_COLUMNS)
                own_words = words + tl.load(tensor + rows.WORDS_AT) + base // 32
                marks = access.load_bits(own_words, BLOCK) | every
                dot, norm = step.coefficients(tensor, coefficients, base, inside, BUILD, BLOCK)
                along = dot, norm, rest_share, onto_share
                if left >= BLOCK:
                    step.resume_chunk(
                        tensor, scalar, along, kth, marks, base, inside, BUILD, False,
                        BLOCK,
                    )  # fmt: skip
                else:
                    step.resume_chunk(
                        tensor, scalar, along, kth, marks, base, inside, BUILD, True,
                        BLOCK,
                    )  # fmt: skip
        elif advances(scalar):
            dot, norm = step.coefficients(tensor, coefficients, base, inside, BUILD, BLOCK)
            along = dot, norm, rest_share, onto_share
            # Bounds on single elements would forbid wide accesses: only the last chunk of a tensor pays for them.
            if left >= BLOCK:
                step.step_chunk(
                    tensor, scalar, along, kth, own_sums, base, inside,
                    BUILD, False, BLOCK,
                )  # fmt: skip
            else:
                step.step_chunk(
                    tensor, scalar, along, kth, own_sums, base, inside,
                    BUILD, True, BLOCK,
                )  # fmt: skip
