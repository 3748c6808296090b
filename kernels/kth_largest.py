"""The exact k-th largest magnitude of an update, without waiting for the host.

It is found in rounds. An interval of patterns of |x| is known to hold it; each round counts the elements in 256 equal
bins of the interval, and the bin that holds rank k becomes the next interval, until it is one pattern wide: at most
four rounds. The first interval is a window around the threshold of the last step, and the elements in it are listed
when they are first seen, with those above it where the step then walks that list: where the list holds all of the
interval, the rounds read it. Where it does not, as at the first step, or where it was too short, they look at all
elements. Counts are integers, and the order of the list does not matter to them: the result is exact, and which way
it was found does not show.

The interval of a round follows from the counts of the one before, which may be sums over processes. Each program of
the round works it out for itself, so that no launch stands between them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fused_merge.kernels import layout, memory, operands, projection, scalars, sparsify, step
from fused_merge.kernels.layout import ENTRY, SCALAR, SCALAR_COLUMNS, Block, Columns, Specialization

BINS = tl.constexpr(256)
ROUNDS = tl.constexpr(4)
# Half the window, in patterns: 2^23 of them make a factor of two, so this is some 3 %.
HALF_WINDOW = tl.constexpr(1 << 18)
LARGEST = tl.constexpr(0x7FFFFFFF)
# About how many programs look at all elements of a launch, in groups of blocks: some for each place on a large GPU, and
# no more, since most of them find nothing to do where a list is read.
PROGRAMS = 1 << 14


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
def first_interval(counts_ptr, counts_here_ptr, kth, k, capacity, SPEC: tl.constexpr):
    """The first `SearchEntry`, from how many elements lie above the window, and how many are listed.

    The counts are of the logical tensor; the list holds elements that are here.
    """
    above, from_low = tl.load(counts_ptr), tl.load(counts_ptr + 1)
    here = tl.load(counts_here_ptr + 1)
    low, last = window(kth)
    low, last = low.to(tl.int64), last.to(tl.int64)
    over = above >= k
    if SPEC.WALKS:
        complete = here <= capacity
    else:
        # What lies above the window is not listed.
        from_low += above
        complete = (here <= capacity) & (over == 0)
    under = from_low < k
    rank = tl.where(over, k, tl.where(under, k - from_low, k - above))
    listed = tl.where(complete & (under == 0), here, -1)
    return (
        tl.where(over, last + 1, tl.where(under, 0, low)),
        tl.where(over, LARGEST, tl.where(under, low - 1, last)),
        rank,
        listed,
    )


@triton.jit
def next_interval(search_ptr, counts_ptr):
    """`low`, `last` and `rank` of the next `SearchEntry`: the bin of this one that holds the rank."""
    low, last = tl.load(search_ptr + SEARCH.low), tl.load(search_ptr + SEARCH.last)
    rank = tl.load(search_ptr + SEARCH.rank)
    bins = tl.arange(0, BINS)
    count = tl.load(counts_ptr + bins)
    above = tl.sum(count) - tl.cumsum(count, axis=0)
    chosen = (above < rank) & (above + count >= rank)
    shift = bin_shift((last - low).to(tl.int32))
    low += tl.sum(tl.where(chosen, bins, 0)).to(tl.int64) << shift
    return low, tl.minimum(low + (1 << shift) - 1, last), rank - tl.sum(tl.where(chosen, above, 0))


@triton.jit
def first_word(tensor_ptr, BLOCK: tl.constexpr):
    """Where the marks of a tensor begin: a word for 32 elements."""
    return tl.load(tensor_ptr + ENTRY.first_block) * (BLOCK // 32)


@triton.jit
def blocks_of_group(tensor_ptr, group, SPEC: tl.constexpr):
    """The numbers of the first block of a group, and of the one after its last."""
    size = tl.load(tensor_ptr + ENTRY.group_blocks)
    return group * size, tl.minimum((group + 1) * size, tl.cdiv(tl.load(tensor_ptr + ENTRY.numel), SPEC.BLOCK))


def list_capacity(numel: int, rate: float, spec: Specialization) -> int:
    """Return how many of `numel` elements the list of a tensor holds.

    A window of 3 % holds some 1 to 2 %; with what lies above it that makes 1.1 to 1.4 of the share that is kept.
    """
    share = max(1 / 32, 1.5 * rate) if spec.WALKS else 1 / 32
    return int(share * layout.block_count(numel, spec.BLOCK) * spec.BLOCK)


@triton.jit
def mark_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, block
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    coefficients_ptr,  # fp32 [T or rows, 2]
    thresholds_ptr,  # int32 [T]: the patterns of the last thresholds
    counts_ptr,  # int64 [T, 256], zeros; written
    mark_bits_ptr,  # int32: a bit an element, written where the step resumes
    firsts_ptr,  # int64 [blocks]: where in the list of its tensor those of a block begin, written where it is walked
    list_ptr,  # fp32: u of the elements that are listed, a list for each tensor; written
    SPEC: tl.constexpr,
):
    """Mark the elements in or above the window around the last threshold, count them, and list u of those in it.

    Where the step resumes, the moments are stored here. Where it walks the list, that holds all that are marked.
    """
    index, number, tensor_ptr, own_scalars_ptr = layout.locate(programs_ptr, tensors_ptr, scalars_ptr)
    base, inside = layout.block_of_tensor(tensor_ptr, number, SPEC)
    b = Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None)
    own_counts_ptr = counts_ptr + index * BINS
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
        u = step.update_since_merge(b, u, SPEC)
        pattern = sparsify.pattern(u)
        low, last = window(tl.load(thresholds_ptr + index))
        marked = memory.within(b, pattern >= low)
        if SPEC.RESUMES:
            words = first_word(b.tensor_ptr, SPEC.BLOCK) + number * (SPEC.BLOCK // 32)
            memory.store_bits(marked, mark_bits_ptr + words, SPEC.BLOCK)
        if tl.load(b.scalars_ptr + SCALAR.moves) != 0.0:
            above = memory.within(b, pattern > last)
            listed = marked.to(tl.int32)
            if not SPEC.WALKS:
                listed = (marked & (pattern <= last)).to(tl.int32)
            tl.atomic_add(own_counts_ptr, tl.sum(above.to(tl.int32)).to(tl.int64), sem="relaxed")
            first = tl.atomic_add(own_counts_ptr + 1, tl.sum(listed).to(tl.int64), sem="relaxed")
            if SPEC.WALKS:
                tl.store(firsts_ptr + tl.load(b.tensor_ptr + ENTRY.first_block) + number, first)
            at = first + (tl.cumsum(listed, axis=0) - listed)
            fits = at < tl.load(b.tensor_ptr + ENTRY.list_capacity)
            own_list_ptr = list_ptr + tl.load(b.tensor_ptr + ENTRY.first_listed)
            tl.store(own_list_ptr + at, u, mask=(listed != 0) & fits)


@triton.jit
def bin_counts(pattern, sought, low, last):
    """How many of the sought patterns lie in each of the 256 bins from `low` to `last`."""
    sought = sought & (pattern >= low) & (pattern <= last)
    bins = tl.where(sought, (pattern - low) >> bin_shift(last - low), 0)
    return tl.histogram(bins, BINS, mask=sought)


@triton.jit
def count_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, group of blocks
    tensors_ptr,  # int64 [T, ...]: `TensorEntry`
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    coefficients_ptr,  # fp32 [T or rows, 2]
    thresholds_ptr,  # int32 [T]: the patterns of the last thresholds
    found_ptr,  # int64 [T, 256]: what the last round has counted, of logical tensors
    found_here_ptr,  # int64 [T, 256]: the same, of the elements that are here
    before_ptr,  # int64 [T, 4]: `SearchEntry` of the last round
    search_ptr,  # int64 [T, 4]: that of this one, written
    counts_ptr,  # int64 [T, 256], zeros; written
    list_ptr,  # fp32: u, a list for each tensor
    SPEC: tl.constexpr,
    FIRST: tl.constexpr,
):
    """One round of a search: choose the interval, and count the elements in its 256 bins."""
    index, group, tensor_ptr, own_scalars_ptr = layout.locate(programs_ptr, tensors_ptr, scalars_ptr)
    own_before_ptr = before_ptr + index * SEARCH_COLUMNS
    own_search_ptr = search_ptr + index * SEARCH_COLUMNS
    if scalars.merges(own_scalars_ptr, SPEC):
        if FIRST:
            kth, k = tl.load(thresholds_ptr + index), tl.load(tensor_ptr + ENTRY.rank)
            capacity = tl.load(tensor_ptr + ENTRY.list_capacity)
            low, last, rank, listed = first_interval(
                found_ptr + index * BINS, found_here_ptr + index * BINS, kth, k, capacity, SPEC
            )
        else:
            listed = tl.load(own_before_ptr + SEARCH.listed)
        groups = tl.cdiv(tl.load(tensor_ptr + ENTRY.numel), SPEC.BLOCK * tl.load(tensor_ptr + ENTRY.group_blocks))
        # Of a list each reads a block, or more than one where there are fewer programs.
        readers = tl.minimum(tl.cdiv(listed, SPEC.BLOCK), groups)
        counts = (listed < 0) | (group < readers)
        if counts | (group == 0):
            if not FIRST:
                low, last, rank = next_interval(own_before_ptr, found_ptr + index * BINS)
            if group == 0:
                tl.store(own_search_ptr + SEARCH.low, low)
                tl.store(own_search_ptr + SEARCH.last, last)
                tl.store(own_search_ptr + SEARCH.rank, rank)
                tl.store(own_search_ptr + SEARCH.listed, listed)
            if counts & (last > low):
                from_low, to_last = low.to(tl.int32), last.to(tl.int32)
                total = tl.zeros((BINS,), tl.int32)
                if listed < 0:
                    first, end = blocks_of_group(tensor_ptr, group, SPEC)
                    for block in range(first, end):
                        base, inside = layout.block_of_tensor(tensor_ptr, block, SPEC)
                        b = Block(tensor_ptr, own_scalars_ptr, base, inside if SPEC.MASKED else None)
                        u = step.update_again(b, projection.coefficients(b, coefficients_ptr, SPEC), SPEC)
                        pattern = sparsify.pattern(u)
                        total += bin_counts(pattern, memory.within(b, pattern >= from_low), from_low, to_last)
                else:
                    own_list_ptr = list_ptr + tl.load(tensor_ptr + ENTRY.first_listed)
                    for start in range(group * SPEC.BLOCK, listed, readers * SPEC.BLOCK):
                        at = start + tl.arange(0, SPEC.BLOCK)
                        u = tl.load(own_list_ptr + at, mask=at < listed, other=0.0)
                        total += bin_counts(sparsify.pattern(u), at < listed, from_low, to_last)
                bins = tl.arange(0, BINS)
                tl.atomic_add(counts_ptr + index * BINS + bins, total.to(tl.int64), mask=total > 0, sem="relaxed")


@triton.jit
def threshold_kernel(
    scalars_ptr,  # fp32 [T, ...]: `ScalarEntry`
    thresholds_ptr,  # int32 [T], written
    search_ptr,  # int64 [T, 4]: `SearchEntry` of the last round
    counts_ptr,  # int64 [ROUNDS + 1, T, 256]: all that was counted; set back to zero
    SPEC: tl.constexpr,
):
    """The pattern of each tensor's k-th largest magnitude, which the last round has found; one program a tensor."""
    index, tensors = tl.program_id(0), tl.num_programs(0)
    if scalars.merges(scalars_ptr + index * SCALAR_COLUMNS, SPEC):
        own_counts_ptr = counts_ptr + index * BINS
        low, _, _ = next_interval(search_ptr + index * SEARCH_COLUMNS, own_counts_ptr + ROUNDS * tensors * BINS)
        tl.store(thresholds_ptr + index, low.to(tl.int32))
        for found in tl.static_range(ROUNDS + 1):
            tl.store(own_counts_ptr + found * tensors * BINS + tl.arange(0, BINS), tl.zeros((BINS,), tl.int64))
