"""The exact k-th largest magnitude of an update among what lies near that of the last step.

Magnitudes are compared by their patterns, as `fused_merge.eager.sparsify` says: every NaN is one, above infinity.
"""

from __future__ import annotations

import numpy as np

from fused_merge.compiled.arithmetic import shrink_one
from fused_merge.compiled.jit import inlined, jit
from fused_merge.compiled.memory import as_bits, as_float
from fused_merge.eager.kth_largest import BINS
from fused_merge.eager.sparsify import NAN_PATTERN as NAN_PATTERNS

import torch

NAN_PATTERN = np.int32(NAN_PATTERNS[torch.float32])
_MAGNITUDE = np.int32(0x7FFFFFFF)


@inlined
def _pattern(bits):
    return min(bits & _MAGNITUDE, NAN_PATTERN)


@jit
def _mark(u, low, last, marks):
    bits = u.view(np.int32)
    for j in range(len(u)):
        pattern = bits[j] & _MAGNITUDE
        marks[j] = np.uint8(pattern >= low) & np.uint8(pattern <= last)


@jit
def _above(u, last):
    bits, over = u.view(np.int32), np.int32(0)
    for j in range(len(u)):
        over += np.int32((bits[j] & _MAGNITUDE) > last)
    return over


@jit
def window(u, low, last, scratch, values, places):
    """List the elements of a block from pattern `low` to `last`; return how many they are, and how many lie above."""
    marks, count, found = scratch.marks, len(u), 0
    _mark(u, low, last, marks[:count])
    octets = (count + 7) // 8
    marks[count : 8 * octets] = 0
    eight = marks.view(np.uint64)
    for octet in range(octets):
        if eight[octet] != 0:
            for j in range(8 * octet, min(8 * octet + 8, count)):
                places[found] = j
                values[found] = u[j]
                found += marks[j]
    return found, _above(u, last)


@jit
def count(u, low, shift, counts):
    """Add how many patterns lie in each of 256 bins of 2^shift patterns, the first of which begins at `low`."""
    bits = u.view(np.int32)
    for j in range(len(u)):
        number = (np.int64(_pattern(bits[j])) - low) >> shift
        if 0 <= number < BINS:
            counts[number] += 1


@jit
def kept(values, places, kth, shrinks, kept_values, kept_places):
    """Write what a ranked F keeps of a list, in its order; return how many."""
    found, threshold = 0, as_float(np.uint32(kth))
    for j in range(len(values)):
        x = values[j]
        if _pattern(np.int32(as_bits(x))) >= kth:
            kept_values[found] = shrink_one(x, threshold) if shrinks else x
            kept_places[found] = places[j]
            found += 1
    return found


@jit
def select(values, found, rank):
    """Return the pattern of the element of a rank, from 1, among lists; they hold that many."""
    total = 0
    for block in range(len(found)):
        total += found[block, 1]
    patterns, j, lowest, highest = np.empty(total, np.int32), 0, NAN_PATTERN, np.int32(0)
    for block in range(len(found)):
        at, listed = found[block]
        for i in range(at, at + listed):
            x = _pattern(np.int32(as_bits(values[i])))
            patterns[j] = x
            j += 1
            lowest, highest = min(lowest, x), max(highest, x)
    counts, low = np.zeros(BINS, np.int64), np.int64(lowest)
    shift = 0
    while (np.int64(highest) - low) >> shift >= BINS:
        shift += 1
    while True:
        counts[:] = 0
        count_patterns(patterns[:total], low, shift, counts)
        chosen = BINS - 1
        while counts[chosen] < rank:
            rank -= counts[chosen]
            chosen -= 1
        low += np.int64(chosen) << shift
        if shift == 0:
            return np.int32(low)
        # Only what lies in the bin that holds the rank is looked at again.
        inside = 0
        for i in range(total):
            x = patterns[i]
            patterns[inside] = x
            inside += (np.int64(x) - low) >> shift == 0
        total, shift = inside, max(0, shift - 8)


@jit
def count_patterns(patterns, low, shift, counts):
    """Count patterns that lie in the bins."""
    for i in range(len(patterns)):
        counts[(np.int64(patterns[i]) - low) >> shift] += 1
