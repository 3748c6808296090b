"""The exact k-th largest magnitude of an update, without waiting for the host.

It is found in rounds. An interval of patterns of |x| is known to hold it; each round counts the elements in 256 equal
bins of the interval, and the bin that holds rank k becomes the next interval, until it is one pattern wide: at most
four rounds. The first interval is a window around the threshold of the last step, and the patterns in it are listed
when elements are first seen: where it holds the threshold, the rounds read that list. Where it does not, as at the
first step, or where too many lie in it, they look at all elements. Counts are integers, and the order of the list
does not matter to them: the result is exact, and which way it was found does not show.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_merge.kernels import layout, memory, operands, projection, scalars, sparsify, step
from fused_merge.kernels.layout import ENTRY, ENTRY_COLUMNS, SCALAR, SCALAR_COLUMNS, Block, Columns

BINS = tl.constexpr(256)
ROUNDS = 4
# Half the window, in patterns: 2^23 of them make a factor of two, so this is some 3 %.
HALF_WINDOW = tl.constexpr(1 << 18)
LARGEST = tl.constexpr(0x7FFFFFFF)
# Blocks that a program looks at in one round, before it adds its counts to those of others.
SEARCH_BLOCKS = tl.constexpr(16)


class SearchEntry(NamedTuple):
    """The state of one tensor's search, int64."""

    low: int  # the interval from here
    last: int  # to here
    rank: int  # of what is sought in it; 1 is its largest
    listed: int  # how many elements are listed, or -1 where all must be looked at


SEARCH = Columns(SearchEntry)
SEARCH_COLUMNS = tl.constexpr(SEARCH.count)


@triton.jit
def window(kth):
    """The patterns from which to which the next threshold is expected, given the last one."""
    return tl.maximum(kth - HALF_WINDOW, 0), tl.minimum(kth, LARGEST - HALF_WINDOW) + (HALF_WINDOW - 1)


@triton.jit
def bin_shift(span):
    """The power of two patterns in a bin, so that 256 bins cover the patterns from 0 to `span`."""
    powers = tl.arange(0, 32)
    return tl.sum(((span >> powers) >= BINS).to(tl.int32))


@triton.jit
def begin_search(search_ptr, counts_ptr, inside_here, kth, k, capacity):
    """Choose the first interval from how many elements lie above the window and in it, and fit in the list.

    The counts are of the logical tensor; the list holds what lies in the window of the elements that are here.
    """
    above, inside = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    tl.store(counts_ptr, above * 0)
    tl.store(counts_ptr + 1, above * 0)
    low, last = window(kth)
    low, last = low.to(tl.int64), last.to(tl.int64)
    over = above >= k
    hit = (above < k) & (above + inside >= k)
    listed = hit & (inside_here <= capacity)
    tl.store(search_ptr + SEARCH.low, tl.where(hit, low, tl.where(over, last + 1, 0)))
    tl.store(search_ptr + SEARCH.last, tl.where(hit, last, tl.where(over, LARGEST, low - 1)))
    tl.store(search_ptr + SEARCH.rank, tl.where(hit, k - above, tl.where(over, k, k - above - inside)))
    tl.store(search_ptr + SEARCH.listed, tl.where(listed, inside_here, -1))


@triton.jit
def narrow_search(search_ptr, counts_ptr):
    """Make the bin that holds the rank the next interval, and the counts zero again; return where it begins."""
    low, last = tl.load(search_ptr + SEARCH.low), tl.load(search_ptr + SEARCH.last)
    rank = tl.load(search_ptr + SEARCH.rank)
    bins = tl.arange(0, BINS)
    count = tl.load(counts_ptr + bins)
    tl.store(counts_ptr + bins, count * 0)
    above = tl.sum(count) - tl.cumsum(count, axis=0)
    chosen = (above < rank) & (above + count >= rank)
    shift = bin_shift((last - low).to(tl.int32))
    low += tl.sum(tl.where(chosen, bins, 0)).to(tl.int64) << shift
    tl.store(search_ptr + SEARCH.low, low)
    tl.store(search_ptr + SEARCH.last, tl.minimum(low + (1 << shift) - 1, last))
    tl.store(search_ptr + SEARCH.rank, rank - tl.sum(tl.where(chosen, above, 0)))
    return low


@triton.jit
def first_word(tensor_ptr, BLOCK: tl.constexpr):
    """Where the marks of a tensor begin, and its list: both have a word for 32 elements."""
    return tl.load(tensor_ptr + ENTRY.first_block) * (BLOCK // 32)


@triton.jit
def list_capacity(tensor_ptr, BLOCK: tl.constexpr):
    """How many patterns of a tensor fit in its list."""
    return tl.cdiv(tl.load(tensor_ptr + ENTRY.numel), BLOCK) * (BLOCK // 32)


@triton.jit
def mark_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, block
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    coefficients_ptr,  # fp32 [T or rows, 2]
    thresholds_ptr,  # int32 [T]: the patterns of the last thresholds
    counts_ptr,  # int64 [T, 256], zeros; written
    mark_bits_ptr,  # int32: a bit an element, written
    list_ptr,  # int32, as many: patterns, a list for each tensor; written
    SPEC: tl.constexpr,
):
    """Mark the elements in or above the window around the last threshold, count them, and list those in it.

    Where the step resumes, the moments are stored here.
    """
    index, number, tensor_ptr, own_scalars_ptr = layout.locate(programs_ptr, tensors_ptr, scalars_ptr)
    base, inside = layout.block_of_tensor(tensor_ptr, number, SPEC)
    b = Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None)
    own_counts_ptr = counts_ptr + index * BINS
    words = first_word(b.tensor_ptr, SPEC.BLOCK)
    # At lr = 0 the moments move and nothing is merged.
    if SPEC.RESUMES:
        runs = scalars.advances(b.scalars_ptr)
    else:
        runs = scalars.merges(b.scalars_ptr, SPEC)
    if runs:
        along = projection.coefficients(b, coefficients_ptr, SPEC)
        m, v, u = step.fresh_update(b, operands.load_tau_dense(b, SPEC), along, SPEC)
        if SPEC.RESUMES:
            operands.store_moments(b, m, v, SPEC)
        pattern = sparsify.pattern(step.update_since_merge(b, u, SPEC))
        low, last = window(tl.load(thresholds_ptr + index))
        marked = memory.within(b, pattern >= low)
        memory.store_bits(marked, mark_bits_ptr + words + number * (SPEC.BLOCK // 32), SPEC.BLOCK)
        if tl.load(b.scalars_ptr + SCALAR.moves) != 0.0:
            above = memory.within(b, pattern > last)
            listed = (marked & (pattern <= last)).to(tl.int32)
            tl.atomic_add(own_counts_ptr, tl.sum(above.to(tl.int32)).to(tl.int64), sem="relaxed")
            first = tl.atomic_add(own_counts_ptr + 1, tl.sum(listed).to(tl.int64), sem="relaxed")
            at = first + (tl.cumsum(listed, axis=0) - listed)
            fits = at < list_capacity(b.tensor_ptr, SPEC.BLOCK)
            tl.store(list_ptr + words + at, pattern, mask=(listed != 0) & fits)


@triton.jit
def search_kernel(
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    thresholds_ptr,  # int32 [T], written when the search ends
    counts_ptr,  # int64 [T, 256], of logical tensors; set back to zero
    counts_here_ptr,  # int64 [T, 256], of the elements that are here
    search_ptr,  # int64 [T, 4]: `SearchEntry`, written
    SPEC: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Narrow the interval that holds each tensor's k-th largest magnitude; one program a tensor."""
    index = tl.program_id(0)
    tensor_ptr = tensors_ptr + index * ENTRY_COLUMNS
    own_search_ptr = search_ptr + index * SEARCH_COLUMNS
    own_counts_ptr = counts_ptr + index * BINS
    if scalars.merges(scalars_ptr + index * SCALAR_COLUMNS, SPEC):
        if FIRST:
            kth, k = tl.load(thresholds_ptr + index), tl.load(tensor_ptr + ENTRY.rank)
            inside_here = tl.load(counts_here_ptr + index * BINS + 1)
            capacity = list_capacity(tensor_ptr, SPEC.BLOCK)
            begin_search(own_search_ptr, own_counts_ptr, inside_here, kth, k, capacity)
        else:
            low = narrow_search(own_search_ptr, own_counts_ptr)
            if LAST:
                tl.store(thresholds_ptr + index, low.to(tl.int32))


@triton.jit
def bin_counts(pattern, sought, low, last):
    """How many of the sought patterns lie in each of the 256 bins from `low` to `last`."""
    sought = sought & (pattern >= low) & (pattern <= last)
    bins = tl.where(sought, (pattern - low) >> bin_shift(last - low), 0)
    return tl.histogram(bins, BINS, mask=sought)


@triton.jit
def count_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, group of SEARCH_BLOCKS blocks
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    coefficients_ptr,  # fp32 [T or rows, 2]
    counts_ptr,  # int64 [T, 256], written
    search_ptr,  # int64 [T, 4]: `SearchEntry`
    list_ptr,  # int32: patterns, a list for each tensor
    SPEC: tl.constexpr,
):
    """One round of a search: count the elements in the 256 bins of the interval."""
    LISTED: tl.constexpr = SPEC.BLOCK * SEARCH_BLOCKS // 32
    index, group, tensor_ptr, own_scalars_ptr = layout.locate(programs_ptr, tensors_ptr, scalars_ptr)
    own_search_ptr = search_ptr + index * SEARCH_COLUMNS
    if scalars.merges(own_scalars_ptr, SPEC):
        low = tl.load(own_search_ptr + SEARCH.low).to(tl.int32)
        last = tl.load(own_search_ptr + SEARCH.last).to(tl.int32)
        listed = tl.load(own_search_ptr + SEARCH.listed)
        if (last > low) & ((listed < 0) | (group * LISTED < listed)):
            total = tl.zeros((BINS,), tl.int32)
            if listed < 0:
                numel = tl.load(tensor_ptr + ENTRY.numel)
                for block in range(SEARCH_BLOCKS):
                    base, inside = layout.block_of_tensor(tensor_ptr, group * SEARCH_BLOCKS + block, SPEC)
                    if base < numel:
                        b = Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None)
                        u = step.update_again(b, projection.coefficients(b, coefficients_ptr, SPEC), SPEC)
                        pattern = sparsify.pattern(u)
                        total += bin_counts(pattern, memory.within(b, pattern >= low), low, last)
            else:
                at = group * LISTED + tl.arange(0, LISTED)
                own_list_ptr = list_ptr + first_word(tensor_ptr, SPEC.BLOCK)
                total = bin_counts(tl.load(own_list_ptr + at, mask=at < listed, other=0), at < listed, low, last)
            bins = tl.arange(0, BINS)
            tl.atomic_add(counts_ptr + index * BINS + bins, total.to(tl.int64), mask=total > 0, sem="relaxed")
