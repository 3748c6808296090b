"""The exact k-th largest magnitude of an update among what lies near that of the last step.

Magnitudes are compared by their patterns, as `fused_merge.eager.sparsify` says: every NaN is one, above infinity.
"""

from __future__ import annotations

import numpy as np
import torch

from fused_merge.compiled.arithmetic import shrink_one
from fused_merge.compiled.jit import inlined, jit, loop
from fused_merge.compiled.layout import LARGEST
from fused_merge.compiled.memory import as_bits, as_float, fp32, int32, int64, lowest_bit, uint8, uint16
from fused_merge.compiled.scratch import MARKS, row
from fused_merge.eager.kth_largest import BINS
from fused_merge.eager.sparsify import NAN_PATTERN

_NAN_PATTERN = np.int32(NAN_PATTERN[torch.float32])
_MAGNITUDE = np.int32(0x7FFFFFFF)


@inlined
def _pattern(bits):
    return min(np.int32(bits & _MAGNITUDE), _NAN_PATTERN)


@loop
def _mark(update: int, low: int, last: int, marks: int, count: int) -> None:
    """Write a byte for each element: whether its pattern is from `low` to `last`."""
    bits, out, lower, upper = int32(update, count), uint8(marks, count), np.int32(low), np.int32(last)
    for j in range(count):
        pattern = np.int32(bits[j] & _MAGNITUDE)
        out[j] = np.uint8(pattern >= lower) & np.uint8(pattern <= upper)


@loop
def _above(update: int, last: int, count: int) -> int:
    """Return how many patterns lie above."""
    bits, over, upper = int32(update, count), np.int32(0), np.int32(last)
    for j in range(count):
        over = np.int32(over + np.int32(np.int32(bits[j] & _MAGNITUDE) > upper))
    return int(over)


@loop
def _list(update: int, marks: int, eights: int, values: int, places: int) -> int:
    """Write the marked elements, eight at a time, and their places; return how many."""
    u, eight = fp32(update, 8 * eights), int64(marks, eights)
    out, at, found = fp32(values, 8 * eights), uint16(places, 8 * eights), 0
    for octet in range(eights):
        word = eight[octet]
        while word != 0:
            # Each byte is of an element.
            j = 8 * octet + (lowest_bit(word) >> 3)
            out[found] = u[j]
            at[found] = j
            found += 1
            word &= word - 1
    return found


@inlined
def window(u, low, last, count, scratch, values, places):
    """List the elements of a block from pattern `low` to `last`; return how many they are, and how many lie above."""
    marks, eights = row(scratch, MARKS), (count + 7) >> 3
    _mark(u, low, last, marks, count)
    rest = uint8(marks, 8 * eights)
    for j in range(count, 8 * eights):
        rest[j] = 0
    above = 0 if last == LARGEST else _above(u, last, count)
    return _list(u, marks, eights, values, places), above


@loop
def count_patterns(update: int, count: int, low: int, shift: int, out: int) -> None:
    """Add how many patterns lie in each of 256 bins of 2^shift patterns, the first of which begins at `low`."""
    bits, counts = int32(update, count), int64(out, BINS)
    for j in range(count):
        number = (np.int64(_pattern(bits[j])) - low) >> shift
        if 0 <= number < BINS:
            counts[number] += 1


@loop
def keep(values: int, places: int, listed: int, kth: int, shrinks: int, out: int, out_places: int) -> int:
    """Write what a ranked F keeps of a list, in its order; return how many."""
    x, at, y, out_at = fp32(values, listed), uint16(places, listed), fp32(out, listed), int32(out_places, listed)
    found, threshold = 0, as_float(np.uint32(kth))
    for j in range(listed):
        y[found] = shrink_one(x[j], threshold) if shrinks != 0 else x[j]
        out_at[found] = at[j]
        found += _pattern(np.int32(as_bits(x[j]))) >= kth
    return found


@jit
def select(values, parts, count, rank):
    """Return the pattern of the element of a rank, from 1, among `count` parts of a list, that have so many."""
    part, counts = int64(parts, 2 * count), np.zeros(BINS, np.int64)
    lowest, highest = _NAN_PATTERN, np.int32(0)
    for i in range(count):
        lowest, highest = _range(values + 4 * part[2 * i], part[2 * i + 1], lowest, highest)
    low, shift = np.int64(lowest), 0
    while (np.int64(highest) - low) >> shift >= BINS:
        shift += 1
    for i in range(count):
        count_patterns(values + 4 * part[2 * i], part[2 * i + 1], low, shift, counts.ctypes.data)
    chosen, rank = _bin_of(counts, rank)
    # Only what lies in the bin that holds the rank is looked at again.
    patterns, total, low = np.empty(counts[chosen] + 1, np.int32), 0, low + (np.int64(chosen) << shift)
    for i in range(count):
        for bits in int32(values + 4 * part[2 * i], part[2 * i + 1]):
            x = _pattern(bits)
            patterns[total] = x
            total += (np.int64(x) - low) >> shift == 0
    while shift > 0:
        shift = max(0, shift - 8)
        counts[:] = 0
        count_patterns(patterns.ctypes.data, total, low, shift, counts.ctypes.data)
        chosen, rank = _bin_of(counts, rank)
        low += np.int64(chosen) << shift
        inside = 0
        for i in range(total):
            x = patterns[i]
            patterns[inside] = x
            inside += (np.int64(x) - low) >> shift == 0
        total = inside
    return np.int32(low)


@inlined
def _range(values, count, lowest, highest):
    """Return the lowest and the highest pattern of a list and of two that were before."""
    for bits in int32(values, count):
        x = _pattern(bits)
        lowest, highest = min(lowest, x), max(highest, x)
    return lowest, highest


@inlined
def _bin_of(counts, rank):
    """Return the bin that holds a rank from the largest on, and the rank there."""
    chosen = BINS - 1
    while counts[chosen] < rank:
        rank -= counts[chosen]
        chosen -= 1
    return chosen, rank
