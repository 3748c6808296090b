"""What a merge did to a block of elements; twin of `fused_merge/eager/merge_stats.py`, whose `MergeSums` it fills."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import consensus, rounding, sums

# Inner products are block sums for `sums.Reduction`; counts are added up where they are.
PRODUCTS = tl.constexpr(4)
COUNTS = tl.constexpr(5)


@triton.jit
def count(condition, counts, column: tl.constexpr):
    """Add the number of elements that fulfil a condition."""
    tl.atomic_add(counts + column, tl.sum(condition.to(tl.int32)).to(tl.int64), sem="relaxed")


@triton.jit
def add_up(
    u,
    u_kept,
    tau,
    merged,
    start,
    inside,
    update_weight,
    products,
    counts,
    STORED: tl.constexpr,
    CONSENSUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`eager.merge_stats.merge_sums` of the elements `inside` the tensor: a row of products, and counts."""
    u = tl.where(inside, u, 0.0)
    u_kept = tl.where(inside, u_kept, 0.0)
    tau = tl.where(inside, tau, 0.0)
    merged = tl.where(inside, merged, 0.0)
    without = consensus.merge(u_kept, tau, update_weight, 0.0, CONSENSUS)
    changed = rounding.nearest(start + merged, STORED) != rounding.nearest(start + without, STORED)
    both = (u != 0) & (tau != 0)
    count(u_kept != 0, counts, 0)
    count(tau != 0, counts, 1)
    count(both, counts, 2)
    count(both & ((u > 0) != (tau > 0)), counts, 3)
    count((tau != 0) & (changed == 0), counts, 4)
    tl.store(products + 0, sums.tree(u * u, BLOCK))
    tl.store(products + 1, sums.tree(tau * tau, BLOCK))
    tl.store(products + 2, sums.tree(merged * merged, BLOCK))
    tl.store(products + 3, sums.tree(u * tau, BLOCK))
