"""Random numbers, word for word those of `fused_merge.eager.philox`.

A counter has the random words of four elements. The loops over counters have no branch and write nothing but their
results, so that they become vector instructions.
"""

from __future__ import annotations

import numpy as np

from fused_merge.compiled.jit import inlined, jit
from fused_merge.compiled.layout import ENTRY
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


@jit
def _draw_kept(kept, counter, high, step, tensor_id, key0, key1, threshold):
    """Write four bits for each counter: which of its words are below the threshold."""
    for j in range(len(kept)):
        w0, w1, w2, w3 = _words(counter + np.uint64(j), high, step, tensor_id, key0, key1)
        bits = np.uint64(w0 < threshold) | (np.uint64(w1 < threshold) << _U1)
        kept[j] = np.uint8(bits | (np.uint64(w2 < threshold) << _U2) | (np.uint64(w3 < threshold) << _U3))


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
def _draw_words(out, counter, high, step, tensor_id, key0, key1):
    """Write the four words of each counter."""
    for j in range(len(out) // 4):
        w0, w1, w2, w3 = _words(counter + np.uint64(j), high, step, tensor_id, key0, key1)
        out[4 * j] = np.uint32(w0)
        out[4 * j + 1] = np.uint32(w1)
        out[4 * j + 2] = np.uint32(w2)
        out[4 * j + 3] = np.uint32(w3)


@jit
def rounding_words(t, base, step, scratch, out):
    """Write the random 32 bits of rounding for the elements from `base` on; uint32."""
    seed, tensor_id, i, end = np.uint64(t[ENTRY.seed]), np.uint64(t[ENTRY.tensor_id]), base, base + len(out)
    while i < end:
        counter, lane, length = _run(t, i, end)
        high = (np.uint64(DOMAIN_ROUNDING) << np.uint64(24)) | np.uint64(counter >> 32)
        words = scratch.random[1, : 4 * ((lane + length + 3) >> 2)]
        _draw_words(words, np.uint64(counter) & _LOW, high, np.uint64(step), tensor_id, seed & _LOW, seed >> _HALF)
        out[i - base : i - base + length] = words[lane : lane + length]
        i += length


@jit
def kept_places(t, base, count, step, domain, scratch, places):
    """Write which of `count` elements from `base` on a random drop keeps, counted from `base`; return how many."""
    seed, tensor_id, i, end = np.uint64(t[ENTRY.seed]), np.uint64(t[ENTRY.tensor_id]), base, base + count
    threshold, found = np.uint64(t[ENTRY.keep_threshold]), 0
    while i < end:
        counter, lane, length = _run(t, i, end)
        high = (np.uint64(domain) << np.uint64(24)) | np.uint64(counter >> 32)
        blocks = (lane + length + 3) >> 2
        kept, first = scratch.kept[:blocks], np.uint64(counter) & _LOW
        _draw_kept(kept, first, high, np.uint64(step), tensor_id, seed & _LOW, seed >> _HALF, threshold)
        # Words of the first and the last counter that are of no element here.
        kept[0] &= np.uint8((0xF << lane) & 0xF)
        kept[blocks - 1] &= np.uint8(0xF >> (4 * blocks - lane - length))
        found = _compact(kept, scratch.candidates, i - base - lane, places, found)
        i += length
    return found


@jit
def _compact(kept, candidates, first, places, found):
    """Append the places of what is kept; no branch depends on it."""
    some = 0
    for j in range(len(kept)):
        candidates[some] = j
        some += kept[j] != 0
    for k in range(some):
        j = candidates[k]
        for lane in range(4):
            places[found] = first + 4 * j + lane
            found += (kept[j] >> lane) & 1
    return found
