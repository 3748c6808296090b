"""F on loaded values, and the exact k-th largest magnitude without waiting for the host.

Twin of `fused_merge/eager/sparsify.py`. A new F that compares with that magnitude is a function, a name in `RANKED`
and a line of `by_rank`.

The k-th largest of a tensor is found in rounds. An interval of patterns of |x| is known to hold it; each round counts
the elements in 256 equal bins of the interval, and the bin that holds rank k becomes the next interval, until it is
one pattern wide: at most four rounds. The first interval is a window around the threshold of the last step, and the
patterns in it are listed when elements are first seen: where it holds the threshold, the rounds read that list. Where
it does not, as at the first step, or where too many lie in it, they look at all elements. Counts are integers, and the
order of the list does not matter to them: the result is exact, and which way it was found does not show.
"""

from __future__ import annotations

import triton
import triton.language as tl

RANKED = ("magnitude", "soft_threshold")

BINS = tl.constexpr(256)
ROUNDS = 4
# Half the window, in patterns: 2^23 of them make a factor of two, so this is some 3 %.
HALF_WINDOW = tl.constexpr(1 << 18)
LARGEST = tl.constexpr(0x7FFFFFFF)

# Columns of the search table, int64: the interval from LOW to LAST, the rank sought in it (1 is its largest), and
# how many elements are listed, or -1 where all must be looked at.
LOW_AT, LAST_AT, RANK_AT, LISTED_AT, SEARCH_COLUMNS = map(tl.constexpr, range(5))


@triton.jit
def pattern(x):
    """Magnitudes as integers: finite values in their order, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def random(x, words, threshold):
    """`eager.sparsify.random`: keep what its random word says."""
    return tl.where(words < threshold, x, 0.0)


@triton.jit
def magnitude(x, kth):
    """`eager.sparsify.magnitude`: keep what is at least the k-th largest |x|, given as a pattern."""
    return tl.where(pattern(x) >= kth, x, 0.0)


@triton.jit
def soft_threshold(x, kth):
    """`eager.sparsify.soft_threshold`: shrink every |x| by the k-th largest, given as a pattern."""
    threshold = kth.to(tl.float32, bitcast=True)
    shrunk = tl.where(tl.abs(x) > threshold, x - tl.where(x < 0, -threshold, threshold), 0.0)
    return tl.where(x == x, shrunk, x)


@triton.jit
def by_rank(x, kth, SPARSIFY: tl.constexpr):
    """F(x) for the F that compare with the k-th largest magnitude."""
    if SPARSIFY == "magnitude":
        return magnitude(x, kth)
    else:
        tl.static_assert(SPARSIFY == "soft_threshold")
        return soft_threshold(x, kth)


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
def begin_search(search, counts, kth, k, capacity):
    """Choose the first interval from how many elements lie above the window and in it, and fit in the list."""
    above = tl.load(counts)
    inside = tl.load(counts + 1)
    tl.store(counts, above * 0)
    tl.store(counts + 1, above * 0)
    low, last = window(kth)
    low = low.to(tl.int64)
    last = last.to(tl.int64)
    over = above >= k
    hit = (above < k) & (above + inside >= k)
    listed = hit & (inside <= capacity)
    tl.store(search + LOW_AT, tl.where(hit, low, tl.where(over, last + 1, 0)))
    tl.store(search + LAST_AT, tl.where(hit, last, tl.where(over, LARGEST, low - 1)))
    tl.store(search + RANK_AT, tl.where(hit, k - above, tl.where(over, k, k - above - inside)))
    tl.store(search + LISTED_AT, tl.where(listed, inside, -1))


@triton.jit
def looks_at_all(search):
    """1 if the k-th largest may be of any element, else 0: it then has a mark, and so has all that is larger."""
    return (tl.load(search + LISTED_AT) < 0).to(tl.int32)


@triton.jit
def narrow_search(search, counts):
    """Make the bin that holds the rank the next interval, and the counts zero again; return where it begins."""
    low = tl.load(search + LOW_AT)
    last = tl.load(search + LAST_AT)
    rank = tl.load(search + RANK_AT)
    bins = tl.arange(0, BINS)
    count = tl.load(counts + bins)
    tl.store(counts + bins, count * 0)
    above = tl.sum(count) - tl.cumsum(count, axis=0)
    chosen = (above < rank) & (above + count >= rank)
    shift = bin_shift((last - low).to(tl.int32))
    low += tl.sum(tl.where(chosen, bins, 0)).to(tl.int64) << shift
    tl.store(search + LOW_AT, low)
    tl.store(search + LAST_AT, tl.minimum(low + (1 << shift) - 1, last))
    tl.store(search + RANK_AT, rank - tl.sum(tl.where(chosen, above, 0)))
    return low
