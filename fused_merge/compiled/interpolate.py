"""R points of the path between pairs of tensors from one read of both, as `fused_merge.eager.interpolate`.

Bytes per element of b bytes: reads 2*b and writes R*b; what lies between the ends reads both anew for each point, from
the innermost caches. Where all are of one dtype, whole lines are written past the caches, which would first read what
they are to hold: without that it is 2*R*b.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fused_merge.compiled import memory, streaming
from fused_merge.compiled.jit import inlined, loop, task
from fused_merge.compiled.layout import columns
from fused_merge.compiled.memory import BLOCK, DTYPES, FP32, as_float, fp32, int64
from fused_merge.compiled.scratch import FIRST, RESULT, ROUNDED, SECOND, row
from fused_merge.compiled.streaming import LINE
from fused_merge.compiled.threads import TASK, TASKS, Blocks, Crew, begin, locate, take
from fused_merge.eager.interpolate import nearer_end

# Bytes of outputs from which on they are written past the caches: they would not stay there.
STREAM_FROM = 1 << 22

# From which end a point is found, or which one it is.
ALONG_BASE, ALONG_TUNED, COPY_BASE, COPY_TUNED = range(4)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PairEntry(NamedTuple):
    """What compiled code knows of a pair of tensors; 64-bit integers."""

    base: int  # addresses, and dtypes of `memory`
    tuned: int
    base_dtype: int
    tuned_dtype: int
    numel: int
    points: int  # the first row of the table of points
    ratios: int  # and how many there are
    streams: int  # whether outputs are written past the caches


class PointEntry(NamedTuple):
    """A point, and where it is written."""

    out: int
    dtype: int
    form: int
    weight: int  # of theta1 - theta0, as the pattern of an fp32 number


PAIR, PAIRS = columns(PairEntry), len(PairEntry._fields)
POINT, POINTS = columns(PointEntry), len(PointEntry._fields)


def why_unsupported(base: Tensor, tuned: Tensor, outs: Sequence[Tensor]) -> str | None:
    """Return in a few words why compiled code cannot interpolate this tensor, or None."""
    for tensor in (base, tuned, *outs):
        if tensor.dtype not in _DTYPES:
            return f"there is no compiled code for {tensor.dtype} tensors"
        if not tensor.is_contiguous():
            return "there is no compiled code for tensors that are not contiguous"
    return None


def interpolate(
    bases: Sequence[Tensor],
    tuneds: Sequence[Tensor],
    ratios: Sequence[Sequence[float]],
    outs: Sequence[Sequence[Tensor]],
) -> None:
    """Write all points of all pairs in one pass.

    Args:
        bases: theta0 of each tensor, contiguous, on the CPU.
        tuneds: theta1 of each tensor, of the same shapes.
        ratios: R finite ratios for each tensor.
        outs: R outputs for each tensor, mutated; with R = 1 it may be one of the ends.
    """
    pairs: list[PairEntry] = []
    points: list[PointEntry] = []
    streams = sum(x.nbytes for own in outs for x in own) >= STREAM_FROM
    for base, tuned, own_ratios, own in zip(bases, tuneds, ratios, outs, strict=True):
        ends = base.data_ptr(), tuned.data_ptr(), DTYPES[base.dtype], DTYPES[tuned.dtype]
        pairs.append(PairEntry(*ends, base.numel(), len(points), len(own), streams))
        points += [_point(ratio, out) for ratio, out in zip(own_ratios, own, strict=True)]
    blocks = Blocks.of(range(len(bases)), [base.numel() for base in bases])
    table, of_points = np.array(pairs, np.int64), np.array(points, np.int64)
    Crew().over(blocks, interpolate_pass, table=table, points=of_points)


def _point(ratio: float, out: Tensor) -> PointEntry:
    form, weight = (COPY_BASE, COPY_TUNED)[ratio == 1.0], 0.0
    if ratio not in (0.0, 1.0):
        weight, from_base = nearer_end(ratio, torch.float32)
        # b - w*(b - a) is b + (-w)*(b - a).
        form, weight = (ALONG_BASE, weight) if from_base else (ALONG_TUNED, -weight)
    return PointEntry(out.data_ptr(), DTYPES[out.dtype], form, int(np.float32(weight).view(np.uint32)))


@task
def interpolate_pass(task: int) -> None:
    """Write all points of blocks."""
    a, (_, scratch), k = int64(task, TASKS), begin(task), 0
    while True:
        start, stop = take(task)
        if start == stop:
            streaming.fence()
            return
        for block in range(start, stop):
            k, number = locate(a, block, k)
            base = BLOCK * number
            pair = int64(a[TASK.table] + 8 * PAIRS * k, PAIRS)
            _write_points(pair, a[TASK.points], base, min(BLOCK, pair[PAIR.numel] - base), scratch)


@inlined
def _bytes(dtype, count):
    return (4 if dtype == FP32 else 2) * count


@inlined
def _write_points(pair, points, base, count, scratch):
    for r in range(pair[PAIR.points], pair[PAIR.points] + pair[PAIR.ratios]):
        point = int64(points + 8 * POINTS * r, POINTS)
        if point[POINT.form] in (ALONG_BASE, ALONG_TUNED):
            _write_between(pair, point, base, count, scratch)
        else:
            _write_end(pair, point, base, count, scratch)


@inlined
def _lines(pair, point, base, count):
    """How many whole cache lines of an output are written past the caches."""
    begins = (point[POINT.out] + _bytes(point[POINT.dtype], base)) % LINE == 0
    return _bytes(point[POINT.dtype], count) // LINE if pair[PAIR.streams] != 0 and begins else 0


@inlined
def _write_between(pair, point, base, count, scratch):
    dtype, weight = point[POINT.dtype], as_float(np.uint32(point[POINT.weight]))
    from_base, streamed = point[POINT.form] == ALONG_BASE, 0
    if pair[PAIR.base_dtype] == dtype and pair[PAIR.tuned_dtype] == dtype:
        lines, offset = _lines(pair, point, base, count), _bytes(dtype, base)
        a, b = pair[PAIR.base] + offset, pair[PAIR.tuned] + offset
        streaming.lines_along(dtype, a if from_base else b, a, b, weight, point[POINT.out] + offset, lines)
        streamed = lines * LINE // _bytes(dtype, 1)
    if streamed < count:
        base, count = base + streamed, count - streamed
        a = memory.load_from(pair[PAIR.base], pair[PAIR.base_dtype], base, count, row(scratch, FIRST))
        b = memory.load_from(pair[PAIR.tuned], pair[PAIR.tuned_dtype], base, count, row(scratch, SECOND))
        along(a if from_base else b, a, b, weight, row(scratch, RESULT), count)
        memory.round_to(dtype, row(scratch, RESULT), point[POINT.out] + _bytes(dtype, base), count)


@inlined
def _write_end(pair, point, base, count, scratch):
    dtype, lines = point[POINT.dtype], _lines(pair, point, base, count)
    address, own = pair[PAIR.base], pair[PAIR.base_dtype]
    if point[POINT.form] == COPY_TUNED:
        address, own = pair[PAIR.tuned], pair[PAIR.tuned_dtype]
    source, out = address + _bytes(own, base), point[POINT.out] + _bytes(dtype, base)
    if own != dtype:
        x = memory.load_from(address, own, base, count, row(scratch, FIRST))
        source = row(scratch, ROUNDED)
        memory.round_to(dtype, x, source, count)
    if source != out:
        streaming.copy_lines(source, out, lines)
        streaming.copy_bytes(source + LINE * lines, out + LINE * lines, _bytes(dtype, count) - LINE * lines)


@loop
def along(end: int, a: int, b: int, weight: float, out: int, count: int) -> None:
    """end + weight*(b - a)."""
    start, x, y, point = fp32(end, count), fp32(a, count), fp32(b, count), fp32(out, count)
    for j in range(count):
        point[j] = start[j] + weight * (y[j] - x[j])
