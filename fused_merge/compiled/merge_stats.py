"""What a merge did to a block, as `fused_merge.eager.merge_stats` adds it up."""

from __future__ import annotations

import numpy as np

from fused_merge.compiled import memory, sums
from fused_merge.compiled.arithmetic import ZERO, consensus_one
from fused_merge.compiled.jit import inlined, jit
from fused_merge.compiled.layout import ENTRY, NO_MASTER, PRODUCT, SCALAR, START, SUMS
from fused_merge.compiled.memory import BF16, FP16, as_bits, as_float

PRODUCTS, COUNTS = 4, 6


@inlined
def _stored(x, dtype):
    """x as a tensor of a dtype holds it."""
    if dtype == BF16:
        return as_float(np.uint32(memory.nearest_bf16(as_bits(x))) << np.uint32(16))
    if dtype == FP16:
        return memory.from_half(memory.to_half(x))
    return x


@jit
def add_up(t, s, u, kept, tau, merged, scratch, products, counts):
    """Write the inner products of a block and add to the counts of a tensor, in the order of `MergeSums`."""
    room, other = scratch.rows[PRODUCT], scratch.rows[SUMS]
    products[0] = sums.inner_product(u, u, room, other)
    products[1] = sums.inner_product(tau, tau, room, other)
    products[2] = sums.inner_product(merged, merged, room, other)
    products[3] = sums.inner_product(u, tau, room, other)
    start, dtype = scratch.rows[START], t[ENTRY.param_dtype] if t[ENTRY.master_kind] == NO_MASTER else memory.FP32
    kind, update_weight, tau_weight = t[ENTRY.consensus], s[SCALAR.update_weight], s[SCALAR.tau_weight]
    for j in range(len(u)):
        keeps_u, keeps_tau, both = kept[j] != ZERO, tau[j] != ZERO, u[j] != ZERO and tau[j] != ZERO
        weight = _stored(start[j] + merged[j], dtype)
        counts[0] += keeps_u
        counts[1] += keeps_tau
        counts[2] += both
        counts[3] += both and (u[j] > ZERO) != (tau[j] > ZERO)
        if keeps_tau:
            only_u = consensus_one(kind, kept[j], tau[j], update_weight, ZERO)
            counts[4] += weight == _stored(start[j] + only_u, dtype)
        if keeps_u:
            only_tau = consensus_one(kind, kept[j], tau[j], ZERO, tau_weight)
            counts[5] += weight == _stored(start[j] + only_tau, dtype)
