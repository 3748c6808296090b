"""The one way in which this library adds up many numbers: a binary tree over neighbours.

Twin of `fused_merge/eager/sums.py`. The sum of an aligned block of 2^k elements is a node of the tree, so that
programs add up blocks, and then blocks of the blocks' sums, until one number a tensor is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_merge.kernels import tables

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
    programs,  # int32 [P, 2]: tensor, chunk
    spans,  # int32 [T, 2]: where the sums of a tensor begin, and how many there are
    sums,  # fp32 [N, C]
    out,  # fp32 [P, C]
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program adds up SIZE block sums of a tensor, for each of C quantities."""
    program = tl.program_id(0)
    span = spans + 2 * tl.load(programs + 2 * program)
    chunk = tl.load(programs + 2 * program + 1)
    at = chunk * SIZE + tl.arange(0, SIZE)
    inside = at < tl.load(span + 1)
    first = tl.load(span)
    for column in tl.static_range(COLUMNS):
        x = tl.load(sums + (first + at).to(tl.int64) * COLUMNS + column, mask=inside, other=0.0)
        tl.store(out + program.to(tl.int64) * COLUMNS + column, tree(x, SIZE))


class Reduction:
    """The launches that add up the block sums of many tensors, however long they are."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        """Plan for `counts[t]` block sums of tensor t, one tensor after the other."""
        self._levels: list[tuple[Tensor, Tensor]] = []
        while max(counts) > 1:
            ends = torch.tensor(counts).cumsum(0)
            spans = torch.stack((ends - torch.tensor(counts), torch.tensor(counts)), 1).to(torch.int32)
            programs = tables.program_table(counts, FAN_IN, device)
            self._levels.append((programs, spans.to(device, non_blocking=True)))
            counts = [-(-count // FAN_IN) for count in counts]

    def __call__(self, sums: Tensor) -> Tensor:
        """Return fp32 `[T, C]` from the block sums `[N, C]`."""
        for programs, spans in self._levels:
            out = sums.new_empty(len(programs), sums.shape[1])
            tree_kernel[(len(programs),)](programs, spans, sums, out, COLUMNS=sums.shape[1], SIZE=FAN_IN)
            sums = out
        return sums
