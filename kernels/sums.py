"""The one way in which this library adds up many numbers: a binary tree over neighbors.

The equations: `fused_merge/eager/sums.py`. The sum of an aligned block of 2^k elements is a node of the tree, so that
programs add up blocks, and then blocks of the blocks' sums, until one number a tensor is left.

    <s*x, y - z>        fp32, for many tensors in one launch and one more for every 1024-fold

Bytes per element: what x, y and z take, each read once; the difference is never written.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_merge.kernels import layout, memory
from fused_merge.kernels.layout import Block, Columns

# Block sums that one program adds up.
FAN_IN = 1024
# A block has at most 2^20 elements.
MOST_LEVELS = tl.constexpr(20)


@triton.jit
def tree(x, SIZE: tl.constexpr):
    """`eager.sums.tree_sum` of SIZE values, a power of two, in adjacent pairs."""
    for level in tl.static_range(MOST_LEVELS):
        # A sum of two has one order; that of more would be the compiler's.
        if (SIZE >> level) > 1:
            x = tl.sum(tl.reshape(x, (SIZE >> (level + 1), 2)), axis=1)
    # A sum of nothing but -0 is 0.
    return tl.sum(x) + 0.0


@triton.jit
def tree_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, and which SIZE of its sums
    ranges_ptr,  # int32 [T, 2]: where the sums of a tensor begin, and how many there are
    sums_ptr,  # fp32 [N, C]
    out_ptr,  # fp32 [P, C], written
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program adds up SIZE block sums of a tensor, for each of C quantities."""
    program = tl.program_id(0)
    range_ptr = ranges_ptr + 2 * tl.load(programs_ptr + 2 * program)
    at = tl.load(programs_ptr + 2 * program + 1) * SIZE + tl.arange(0, SIZE)
    inside = at < tl.load(range_ptr + 1)
    first = tl.load(range_ptr)
    for column in tl.static_range(COLUMNS):
        x = tl.load(sums_ptr + (first + at).to(tl.int64) * COLUMNS + column, mask=inside, other=0.0)
        tl.store(out_ptr + program.to(tl.int64) * COLUMNS + column, tree(x, SIZE))


# What a launch knows of x, y and z, int64; `first_block` is that of these tensors among the blocks of all.
TripleEntry = namedtuple("TripleEntry", "x y z numel first_block")
TRIPLE = Columns(TripleEntry)
TRIPLE_COLUMNS = tl.constexpr(TRIPLE.count)


class Specialization(NamedTuple):
    """What one compiled form of the products is special to."""

    X: tl.dtype
    Y: tl.dtype | None  # None for <x, x>
    Z: tl.dtype | None  # None for <x, y>
    ALIGNED: bool
    BLOCK: int
    MASKED: bool = False


@triton.jit
def inner_products_kernel(
    programs_ptr,  # int32 [P, 2]: tensor, block
    triples_ptr,  # int64 [T, 5]: `TripleEntry`
    scale_ptr,  # fp32, 0-d
    out_ptr,  # fp32 [blocks, 1], written
    SPEC: tl.constexpr,
):
    """<s*x, y - z> of a block of elements: a node of the tree."""
    _, number, triple_ptr, _ = layout.locate(programs_ptr, triples_ptr, scale_ptr, TRIPLE_COLUMNS, 0)
    base = number * SPEC.BLOCK
    inside = tl.arange(0, SPEC.BLOCK) < tl.load(triple_ptr + TRIPLE.numel) - base
    b = Block(triple_ptr, scale_ptr, base, inside if SPEC.MASKED else None)
    x = tl.load(scale_ptr) * memory.load(b, TRIPLE.x, SPEC.X, SPEC).to(tl.float32)
    y = x
    if SPEC.Y is not None:
        y = memory.load(b, TRIPLE.y, SPEC.Y, SPEC).to(tl.float32)
    if SPEC.Z is not None:
        y = y - memory.load(b, TRIPLE.z, SPEC.Z, SPEC).to(tl.float32)
    tl.store(out_ptr + tl.load(triple_ptr + TRIPLE.first_block) + number, tree(x * y, SPEC.BLOCK))


class Reduction:
    """The launches that add up the block sums of many tensors, however long they are."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        """Plan for `counts[t]` block sums of tensor t, one tensor after the other."""
        self._levels: list[tuple[Tensor, Tensor]] = []
        while max(counts, default=0) > 1:
            ends = torch.tensor(counts).cumsum(0)
            ranges = torch.stack((ends - torch.tensor(counts), torch.tensor(counts)), 1).to(torch.int32)
            programs = layout.program_table(tuple(counts), FAN_IN, device)
            self._levels.append((programs, ranges.to(device, non_blocking=True)))
            counts = [-(-count // FAN_IN) for count in counts]

    def __call__(self, sums: Tensor) -> Tensor:
        """Return fp32 `[T, C]` from the block sums `[N, C]`."""
        for programs, ranges in self._levels:
            out = sums.new_empty(len(programs), sums.shape[1])
            tree_kernel[(len(programs),)](
                programs, ranges, sums, out, COLUMNS=sums.shape[1], SIZE=FAN_IN,
                num_warps=layout.NUM_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
            sums = out
        return sums


Triple = tuple[Tensor, Tensor | None, Tensor | None]


def why_unsupported(triple: Triple) -> str | None:
    """Return in a few words why the kernel cannot multiply these tensors, or None."""
    for tensor in triple:
        if tensor is not None and tensor.dtype not in layout.TL_DTYPE:
            return f"{tensor.dtype} tensors have no kernel"
    return None


# The products of all tensors that share a `Specialization`, these by their numbers: programs, entries, block sums.
Launch = tuple[Specialization, list[int], layout.Programs, Tensor, Reduction]


class Plan(layout.Remembered[list[Launch]]):
    """What repeated products of the same tensors keep on a device: their tables."""


def _launches(triples: Sequence[Triple], block: int) -> list[Launch]:
    dtypes = [[None if x is None else layout.TL_DTYPE[x.dtype] for x in triple] for triple in triples]
    aligned = map(layout.is_aligned, triples)
    groups = layout.group(Specialization(*own, wide, block) for own, wide in zip(dtypes, aligned, strict=True))
    device, launches = triples[0][0].device, []
    for spec, members in groups.items():
        numels = tuple(triples[i][0].numel() for i in members)
        counts = [layout.block_count(numel, block) for numel in numels]
        entries = [
            TripleEntry(*(0 if x is None else x.data_ptr() for x in triples[i]), numel, first_block)
            for i, numel, first_block in zip(members, numels, accumulate(counts, initial=0), strict=False)
        ]
        table = torch.tensor(entries, dtype=torch.int64).to(device, non_blocking=True)
        programs = layout.split_programs(numels, block, device)
        launches.append((spec, members, programs, table, Reduction(counts, device)))
    return launches


def inner_products(
    triples: Sequence[Triple], scale: Tensor, *, plan: Plan | None = None, block: int = layout.DEFAULT_BLOCK
) -> list[Tensor]:
    """Return <s*x, y - z>, 0-d fp32, for tensors on one device, together for all that share a `Specialization`.

    Args:
        triples: x, y and z of each; without y it is <s*x, s*x>, without z <s*x, y>.
        scale: s, 0-d fp32 on that device.
        plan: what the last call with these tensors has left.
        block: elements per program.
    """
    contiguous = [(x.contiguous(), *(t if t is None else t.contiguous() for t in others)) for x, *others in triples]
    results: list[Tensor] = [scale] * len(triples)
    tensors = [[x is not None and (x.data_ptr(), x.numel(), x.dtype) for x in triple] for triple in contiguous]
    launches = (plan or Plan()).get((block, tensors), lambda: _launches(contiguous, block))
    for spec, members, programs, table, add_up in launches:
        out = torch.empty(sum(map(len, programs)), 1, dtype=torch.float32, device=scale.device)
        layout.launch(inner_products_kernel, programs, table, scale, out, spec=spec)
        for member, product in zip(members, add_up(out).unbind(), strict=True):
            results[member] = product[0]
    return results
