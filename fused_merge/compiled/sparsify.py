"""F of a dense reference delta, straight into the storage of `fused_merge.eager.sparse`.

A first pass finds which elements are kept: the words of the mask, and how many stand in each of its blocks. Then it is
known where the values of a block begin, and a second pass writes them. Nothing of the size of the tensor is made.

Bytes per element of b bytes: a random F reads b only around what it keeps; the others read b once, to shrink it twice,
and for the threshold b twice more. Mask and values are written once, and the mask is read once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused_merge.compiled import arithmetic, layout, memory, philox, search, sparse
from fused_merge.compiled.jit import inlined, loop, task
from fused_merge.compiled.layout import ENTRIES, ENTRY, NONE, RANDOM, SOFT_THRESHOLD, TensorEntry
from fused_merge.compiled.memory import BLOCK, DTYPES, FP32, int32, int64, uint8, uint16, uint32
from fused_merge.compiled.scratch import FIRST, MARKS, PLACES, RESULT, ROUNDED, THIRD, row
from fused_merge.compiled.threads import TASK, TASKS, Blocks, Crew, begin, locate, take
from fused_merge.eager.kth_largest import narrow, shifts
from fused_merge.eager.philox import DOMAIN_TAU, keep_threshold
from fused_merge.eager.shard import ShardIndex
from fused_merge.eager.sparse import BLOCK as SPARSE_BLOCK
from fused_merge.eager.sparse import WORDS, SparseTensor, block_count, offset_dtype
from fused_merge.eager.sparsify import pattern, widened
from fused_merge.lockstep import LocalSum, Steps

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_ENTRY = TensorEntry(*[0] * ENTRIES)
# Of a tensor that one process holds, the k-th largest is found in two rounds of 2^16 bins, which takes longer than
# torch does for few elements.
_OWN_SHIFTS = (16, 0)
_BINS_FROM = 1 << 15
_PATTERN_BITS = 32
_MAGNITUDE, _NAN_PATTERN = np.int32(0x7FFFFFFF), np.int32(search._NAN_PATTERN)
_GATHER = np.uint64(0x0102040810204080)
_TOP = np.uint64(56)


def why_unsupported(tau: Tensor, method: str) -> str | None:
    """Return in a few words why compiled code cannot sparsify a tensor, or None."""
    if tau.dtype not in _DTYPES:
        return f"there is no compiled code for {tau.dtype} reference deltas"
    if method not in layout.SPARSIFY:
        return f"there is no compiled code for F {method!r}"
    return None


class Delta:
    """A dense reference delta of one tensor, or of what a process holds of one, on the CPU."""

    def __init__(self, tau: Tensor) -> None:
        self._tau = tau.contiguous()
        self._blocks, self._crew = Blocks.of([0], [tau.numel()]), Crew()
        self._entry = _NO_ENTRY._replace(
            tau=self._tau.data_ptr(), tau_dtype=DTYPES[tau.dtype], numel=tau.numel(), merges=1
        )

    def kth_largest(self, k: int, groups: tuple[Any, ...]) -> Steps[int]:
        """Find the pattern of the k-th largest magnitude of a tensor that processes may hold together, from 1."""
        if not groups and self._tau.numel() < _BINS_FROM:
            return int(pattern(widened(self._tau)).flatten().kthvalue(self._tau.numel() - k + 1).values)
        table = np.array([self._entry], np.int64)
        low, rank, bits = torch.tensor(0), torch.tensor(k), _PATTERN_BITS
        for shift in shifts(torch.float32) if groups else _OWN_SHIFTS:
            bins = 1 << (bits - shift)
            counts = np.zeros((self._blocks.threads, bins), np.int64)
            told = {"table": table, "first": int(low), "shift": shift, "room": bins, "counts": counts}
            self._crew.over(self._blocks, count_pass, **told)
            total = torch.from_numpy(counts.sum(0))
            yield [LocalSum(total, groups)]
            low, rank = narrow(total, low, rank, shift)
            bits = shift
        return int(low)

    def sparsify(
        self, method: str, rate: float, *, kth: int, seed: int, tensor_id: int, elements: ShardIndex
    ) -> SparseTensor:
        """Return F(tau); `kth` is the threshold of a ranked F, and the other arguments are those of a random one."""
        tau, numel = self._tau, self._tau.numel()
        entry = self._entry._replace(
            **elements._asdict(),
            tensor_id=tensor_id,
            seed=(seed + 2**63) % 2**64 - 2**63,
            keep_threshold=keep_threshold(rate),
            sparsify=NONE if rate == 1.0 else layout.SPARSIFY[method],
        )
        blocks = block_count(numel)
        mask, counts = torch.zeros(blocks * WORDS, dtype=torch.int32), np.zeros(blocks, np.int64)
        told = {"table": np.array([entry], np.int64), "kths": np.array([kth], np.int32), "places": mask.numpy()}
        self._crew.over(self._blocks, mark_pass, **told, counts=counts)
        firsts = np.concatenate(([0], np.cumsum(counts)))
        values = torch.empty(int(firsts[-1]), dtype=tau.dtype)
        self._crew.over(self._blocks, pack_pass, **told, own_firsts=firsts, values=values.data_ptr())
        offsets = torch.from_numpy(firsts[:-1]).to(offset_dtype(values.numel()))
        return SparseTensor(mask, values, offsets, tau.shape)


@loop
def _count(source: int, count: int, low: int, shift: int, bins: int, out: int) -> None:
    """Add how many patterns lie in each of some bins of 2^shift patterns, the first of which begins at `low`."""
    bits, counts = int32(source, count), int64(out, bins)
    for j in range(count):
        pattern = min(np.int32(bits[j] & _MAGNITUDE), _NAN_PATTERN)
        number = (np.int64(pattern) - low) >> shift
        if 0 <= number < bins:
            counts[number] += 1


@task
def count_pass(task: int) -> None:
    """Add to `counts`, int64 `[threads, bins]`."""
    a, (thread, scratch), k = int64(task, TASKS), begin(task), 0
    low, shift, bins = a[TASK.first], a[TASK.shift], a[TASK.room]
    last, out = low + (bins << shift) - 1, a[TASK.counts] + 8 * bins * thread
    # Every NaN counts as the least of them.
    last = layout.LARGEST if last >= _NAN_PATTERN else last
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, number = locate(a, block, k)
            base = BLOCK * number
            t = int64(a[TASK.table] + 8 * ENTRIES * k, ENTRIES)
            count = min(BLOCK, t[ENTRY.numel] - base)
            x = memory.load(t, ENTRY.tau, base, count, row(scratch, FIRST))
            if low > 0 or last < layout.LARGEST:
                # Few elements are left, and only they are looked at by themselves.
                count, _ = search.window(x, low, last, count, scratch, row(scratch, RESULT), row(scratch, THIRD))
                x = row(scratch, RESULT)
            _count(x, count, low, shift, bins, out)


@loop
def _mark_nonzero(source: int, dtype: int, marks: int, count: int) -> None:
    """Write a byte for each element: whether it is not zero."""
    out = uint8(marks, count)
    if dtype == FP32:
        bits = uint32(source, count)
        for j in range(count):
            out[j] = np.uint8((bits[j] & np.uint32(0x7FFFFFFF)) != np.uint32(0))
    else:
        halves = uint16(source, count)
        for j in range(count):
            out[j] = np.uint8((halves[j] & np.uint16(0x7FFF)) != np.uint16(0))


@loop
def _pack_bits(marks: int, octets: int, out: int) -> None:
    """Write bytes of 0 and 1 as bits, eight at a time."""
    eight, bits = int64(marks, octets), uint8(out, octets)
    for j in range(octets):
        # The product gathers them in its highest byte.
        bits[j] = np.uint8((np.uint64(eight[j]) * _GATHER) >> _TOP)


@loop
def _set_bits(source: int, dtype: int, places: int, found: int, mask: int) -> None:
    """Set the bits of elements at some places that are not zero."""
    at, words = int32(places, found), uint32(mask, BLOCK // 32)
    wide, narrow_ = uint32(source, BLOCK), uint16(source, BLOCK)
    for k in range(found):
        j = np.int64(at[k])
        if dtype == FP32:
            nonzero = (wide[j] & np.uint32(0x7FFFFFFF)) != np.uint32(0)
        else:
            nonzero = (narrow_[j] & np.uint16(0x7FFF)) != np.uint16(0)
        words[j >> 5] |= np.uint32(np.uint32(nonzero) << np.uint32(j & 31))


@loop
def _count_bits(mask: int, words: int) -> int:
    """Return how many bits of words of 64 are set."""
    bits, found = int64(mask, words), 0
    for j in range(words):
        word = bits[j]
        while word != 0:
            found += 1
            word &= word - 1
    return found


@loop
def _gather(source: int, dtype: int, places: int, found: int, out: int) -> None:
    """Write the elements at some places, as they are stored."""
    at = int32(places, found)
    if dtype == FP32:
        x, y = uint32(source, BLOCK), uint32(out, found)
        for k in range(found):
            y[k] = x[at[k]]
    else:
        half, packed = uint16(source, BLOCK), uint16(out, found)
        for k in range(found):
            packed[k] = half[at[k]]


@inlined
def _kept(t, kth, base, count, scratch):
    """Return where F of the elements of a block lies, in their dtype, for what is not random."""
    dtype = t[ENTRY.tau_dtype]
    if t[ENTRY.sparsify] == NONE:
        return t[ENTRY.tau] + (4 if dtype == FP32 else 2) * base
    x, out = memory.load(t, ENTRY.tau, base, count, row(scratch, FIRST)), row(scratch, RESULT)
    if t[ENTRY.sparsify] == SOFT_THRESHOLD:
        arithmetic.shrink_by(x, kth, out, count)
    else:
        arithmetic.keep_from(x, kth, out, count)
    if dtype == FP32:
        return out
    memory.round_to(dtype, out, row(scratch, ROUNDED), count)
    return row(scratch, ROUNDED)


@task
def mark_pass(task: int) -> None:
    """Write the mask of blocks, `places`, and `counts`, int64, how many are kept in each block of the format."""
    a, (_, scratch), k = int64(task, TASKS), begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, number = locate(a, block, k)
            base = BLOCK * number
            t = int64(a[TASK.table] + 8 * ENTRIES * k, ENTRIES)
            count, dtype, mask = min(BLOCK, t[ENTRY.numel] - base), t[ENTRY.tau_dtype], a[TASK.places] + base // 8
            if t[ENTRY.sparsify] == RANDOM:
                places, source = row(scratch, PLACES), t[ENTRY.tau] + (4 if dtype == FP32 else 2) * base
                found = philox.kept_places(t, base, count, 0, DOMAIN_TAU, scratch, places)
                _set_bits(source, dtype, places, found, mask)
            else:
                marks, octets = row(scratch, MARKS), (count + 7) >> 3
                _mark_nonzero(_kept(t, int32(a[TASK.kths], 1)[0], base, count, scratch), dtype, marks, count)
                rest = uint8(marks, 8 * octets)
                for j in range(count, 8 * octets):
                    rest[j] = 0
                _pack_bits(marks, octets, mask)
            counts, number = int64(a[TASK.counts], 1), base // SPARSE_BLOCK
            for j in range((count + SPARSE_BLOCK - 1) // SPARSE_BLOCK):
                counts[number + j] = _count_bits(mask + 4 * WORDS * j, WORDS // 2)


@task
def pack_pass(task: int) -> None:
    """Write `values`, the first of each block of the format being that of its number in `own_firsts`."""
    a, (_, scratch), k = int64(task, TASKS), begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            return
        for block in range(start, stop):
            k, number = locate(a, block, k)
            base = BLOCK * number
            t = int64(a[TASK.table] + 8 * ENTRIES * k, ENTRIES)
            count, dtype, places = min(BLOCK, t[ENTRY.numel] - base), t[ENTRY.tau_dtype], row(scratch, PLACES)
            size, first = 4 if dtype == FP32 else 2, int64(a[TASK.own_firsts] + 8 * (base // SPARSE_BLOCK), 1)[0]
            # Blocks of the format are whole words of 64 bits; those of padding are not set.
            found = sparse.set_places(a[TASK.places] + base // 8, (count + 63) >> 6, places)
            source = t[ENTRY.tau] + size * base
            if t[ENTRY.sparsify] == SOFT_THRESHOLD:
                source = _kept(t, int32(a[TASK.kths], 1)[0], base, count, scratch)
            _gather(source, dtype, places, found, a[TASK.values] + size * first)
