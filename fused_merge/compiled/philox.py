"""Random numbers, word for word those of `fused_merge.eager.philox`.

A counter has the random words of four elements. The loops over counters have no branch and write nothing but their
results, so that they become vector instructions.
"""

from __future__ import annotations

import numpy as np

from fused_merge.compiled.jit import inlined, jit, loop
from fused_merge.compiled.layout import ENTRY
from fused_merge.compiled.memory import copy, int32, int64, lowest_bit, uint8, uint32
from fused_merge.compiled.scratch import MARKS, WORDS, row
from fused_merge.eager.philox import DOMAIN_ROUNDING, KEY_INCREMENTS, MULTIPLIERS, ROUNDS

_M0, _M1 = map(np.uint64, MULTIPLIERS)
_W0, _W1 = map(np.uint64, KEY_INCREMENTS)
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_U1, _U2, _U3 = np.uint64(1), np.uint64(2), np.uint64(3)


@inlined
def _words(counter, high, step, tensor_id, key0, key1):
    """Return the four words of a counter; 32 bits in uint64, as all arguments are."""
    c0, c1, c2, c3 = counter, high, step, tensor_id
    for _ in range(ROUNDS):
        low = c0 * _M0
        mixed = c2 * _M1
        c0 = (mixed >> _HALF) ^ c1 ^ key0
        c1 = mixed & _LOW
        c2 = (low >> _HALF) ^ c3 ^ key1
        c3 = low & _LOW
        key0 = (key0 + _W0) & _LOW
        key1 = (key1 + _W1) & _LOW
    return c0, c1, c2, c3


@loop
def _draw_kept(
    out: int, count: int, counter: int, high: int, step: int, tensor_id: int, key0: int, key1: int, threshold: int
) -> None:
    """Write four bits for each of `count` counters: which of its words are below the threshold; uint8."""
    kept, first, below = uint8(out, count), np.uint64(counter), np.uint64(threshold)
    c1, c2, c3, k0, k1 = np.uint64(high), np.uint64(step), np.uint64(tensor_id), np.uint64(key0), np.uint64(key1)
    for j in range(count):
        w0, w1, w2, w3 = _words(first + np.uint64(j), c1, c2, c3, k0, k1)
        bits = np.uint64(w0 < below) | (np.uint64(w1 < below) << _U1)
        kept[j] = np.uint8(bits | (np.uint64(w2 < below) << _U2) | (np.uint64(w3 < below) << _U3))


@loop
def _draw_words(out: int, count: int, counter: int, high: int, step: int, tensor_id: int, key0: int, key1: int) -> None:
    """Write the four words of each of `count` counters; uint32."""
    words, first = uint32(out, 4 * count), np.uint64(counter)
    c1, c2, c3, k0, k1 = np.uint64(high), np.uint64(step), np.uint64(tensor_id), np.uint64(key0), np.uint64(key1)
    for j in range(count):
        w0, w1, w2, w3 = _words(first + np.uint64(j), c1, c2, c3, k0, k1)
        words[4 * j] = np.uint32(w0)
        words[4 * j + 1] = np.uint32(w1)
        words[4 * j + 2] = np.uint32(w2)
        words[4 * j + 3] = np.uint32(w3)


@loop
def append(marks: int, eights: int, first: int, places: int) -> int:
    """Write the places that are marked, eight counters at a time; return how many."""
    eight, out, found = int64(marks, eights), int32(places, 32 * eights), 0
    for j in range(eights):
        word = eight[j]
        while word != 0:
            bit = lowest_bit(word)
            # Each byte is of a counter, and has a bit for each of its words.
            out[found] = first + 32 * j + 4 * (bit >> 3) + (bit & 7)
            found += 1
            word &= word - 1
    return found


@inlined
def _element(t, i):
    """Return the number in the unsharded tensor of local element i."""
    return t[ENTRY.offset] + i // t[ENTRY.local_inner] * t[ENTRY.global_inner] + i % t[ENTRY.local_inner]


@jit
def random_word(t, i, step, domain):
    """Return the random 32 bits of local element i."""
    element, seed = _element(t, i), np.uint64(t[ENTRY.seed])
    counter = np.uint64(element >> 2)
    high = (np.uint64(domain) << np.uint64(24)) | (counter >> _HALF)
    w0, w1, w2, w3 = _words(
        counter & _LOW, high, np.uint64(step), np.uint64(t[ENTRY.tensor_id]), seed & _LOW, seed >> _HALF
    )
    lane = element & 3
    return w0 if lane == 0 else w1 if lane == 1 else w2 if lane == 2 else w3


@inlined
def _run(t, i, end):
    """Return the first counter of local element i, its word there, and how many elements up to `end` follow on.

    These are neighbors in the unsharded tensor, and the upper halves of their counters are the same.
    """
    element, inner = _element(t, i), t[ENTRY.local_inner]
    counter, lane = element >> 2, element & 3
    length = min(inner - i % inner, end - i)
    return counter, lane, min(length, 4 * ((((counter >> 32) + 1) << 32) - counter) - lane)


@jit
def rounding_words(t, base, count, step, scratch, out):
    """Write the random 32 bits of rounding for the elements from `base` on; uint32."""
    seed, i, end = t[ENTRY.seed], base, base + count
    while i < end:
        counter, lane, length = _run(t, i, end)
        words, high = row(scratch, WORDS), (DOMAIN_ROUNDING << 24) | (counter >> 32)
        key = t[ENTRY.tensor_id], seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        _draw_words(words, (lane + length + 3) >> 2, counter & 0xFFFFFFFF, high, np.int64(step), *key)
        copy(words + 4 * lane, out + 4 * (i - base), length)
        i += length


@jit
def kept_places(t, base, count, step, domain, scratch, places):
    """Write which of `count` elements from `base` on a random drop keeps, counted from `base`; return how many."""
    seed, i, end, found = t[ENTRY.seed], base, base + count, 0
    while i < end:
        counter, lane, length = _run(t, i, end)
        blocks, high = (lane + length + 3) >> 2, (domain << 24) | (counter >> 32)
        key = t[ENTRY.tensor_id], seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
        marks = row(scratch, MARKS)
        _draw_kept(marks, blocks, counter & 0xFFFFFFFF, high, np.int64(step), *key, t[ENTRY.keep_threshold])
        eights = (blocks + 7) >> 3
        kept = uint8(marks, 8 * eights)
        # Words of the first and the last counter that are of no element here, and counters past the last.
        kept[0] &= np.uint8((0xF << lane) & 0xF)
        kept[blocks - 1] &= np.uint8(0xF >> (4 * blocks - lane - length))
        for j in range(blocks, 8 * eights):
            kept[j] = 0
        found += append(marks, eights, i - base - lane, places + 4 * found)
        i += length
    return found
