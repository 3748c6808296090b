"""What a merge did to a block of elements, for `MergeSums` of `fused_merge/eager/merge_stats.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import consensus, memory, rounding, sums
from fused_merge.kernels.layout import SCALAR

# Inner products are block sums for `sums.Reduction`; counts are added up where they are.
PRODUCTS = tl.constexpr(4)
COUNTS = tl.constexpr(6)


@triton.jit
def count(condition, count_ptr):
    """Add the number of elements that fulfil a condition."""
    tl.atomic_add(count_ptr, tl.sum(condition.to(tl.int32)).to(tl.int64), sem="relaxed")


@triton.jit
def add_up(b, u, u_kept, tau, merged, start, sums_ptr, SPEC: tl.constexpr):
    """`eager.merge_stats.merge_sums` of a block: an entry of products, and counts of its tensor."""
    if SPEC.STATS:
        products_ptr, counts_ptr = sums_ptr
        STORED: tl.constexpr = SPEC.PARAM if SPEC.MASTER == "none" else tl.float32
        u = memory.or_zero(b, u)
        u_kept = memory.or_zero(b, u_kept)
        tau = memory.or_zero(b, tau)
        merged = memory.or_zero(b, merged)
        update_weight = tl.load(b.scalars_ptr + SCALAR.update_weight)
        CONSENSUS: tl.constexpr = SPEC.CONSENSUS
        tau_weight = tl.load(b.scalars_ptr + SCALAR.tau_weight)
        weight = rounding.nearest(start + merged, STORED)
        only_u = consensus.merge(u_kept, tau, update_weight, 0.0, CONSENSUS)
        only_tau = consensus.merge(u_kept, tau, 0.0, tau_weight, CONSENSUS)
        tau_changed = weight != rounding.nearest(start + only_u, STORED)
        u_changed = weight != rounding.nearest(start + only_tau, STORED)
        both = (u != 0) & (tau != 0)
        count(u_kept != 0, counts_ptr + 0)
        count(tau != 0, counts_ptr + 1)
        count(both, counts_ptr + 2)
        count(both & ((u > 0) != (tau > 0)), counts_ptr + 3)
        count((tau != 0) & (tau_changed == 0), counts_ptr + 4)
        count((u_kept != 0) & (u_changed == 0), counts_ptr + 5)
        tl.store(products_ptr + 0, sums.tree(u * u, SPEC.BLOCK))
        tl.store(products_ptr + 1, sums.tree(tau * tau, SPEC.BLOCK))
        tl.store(products_ptr + 2, sums.tree(merged * merged, SPEC.BLOCK))
        tl.store(products_ptr + 3, sums.tree(u * tau, SPEC.BLOCK))
