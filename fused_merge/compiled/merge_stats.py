"""What a merge did to a block, as `fused_merge.eager.merge_stats` adds it up."""

from __future__ import annotations

from fused_merge.compiled import memory, sums
from fused_merge.compiled.arithmetic import ONE, ZERO, consensus_one
from fused_merge.compiled.jit import inlined, jit, loop
from fused_merge.compiled.layout import ENTRY, NO_MASTER, SCALAR
from fused_merge.compiled.memory import BF16, FP16, FP32, as_bits, fp32, int64
from fused_merge.compiled.scratch import PRODUCT, START, SUMS, row

PRODUCTS, COUNTS = 4, 6


@inlined
def _stored(x, dtype):
    """x as a tensor of a dtype holds it."""
    if dtype == BF16:
        return memory.from_bf16(memory.nearest_bf16(as_bits(x)))
    if dtype == FP16:
        return memory.from_half(memory.to_half(x))
    return x


@loop
def _count(
    update: int, kept: int, tau: int, merged: int, start: int, dtype: int, kind: int, update_weight: float,
    tau_weight: float, count: int, out: int,
) -> None:  # fmt: skip
    """Add to six counts, int64, in the order of `MergeSums`."""
    u, k, d, x, begin = (
        fp32(update, count),
        fp32(kept, count),
        fp32(tau, count),
        fp32(merged, count),
        fp32(start, count),
    )
    counts = int64(out, COUNTS)
    for j in range(count):
        both = u[j] != ZERO and d[j] != ZERO
        weight = _stored(begin[j] + x[j], dtype)
        counts[2] += both
        counts[3] += both and (u[j] > ZERO) != (d[j] > ZERO)
        if k[j] != ZERO:
            only_tau = consensus_one(kind, k[j], d[j], ZERO, tau_weight)
            counts[0] += 1
            counts[5] += weight == _stored(begin[j] + only_tau, dtype)
        if d[j] != ZERO:
            only_u = consensus_one(kind, k[j], d[j], update_weight, ZERO)
            counts[1] += 1
            counts[4] += weight == _stored(begin[j] + only_u, dtype)


@jit
def add_up(t, s, u, kept, tau, merged, count, scratch, products, counts):
    """Write the inner products of a block, fp32 `[4]`, and add to a tensor's counts, in the order of `MergeSums`."""
    room, other, out = row(scratch, PRODUCT), row(scratch, SUMS), fp32(products, PRODUCTS)
    out[0] = sums.inner_product(u, u, ONE, room, other, count)
    out[1] = sums.inner_product(tau, tau, ONE, room, other, count)
    out[2] = sums.inner_product(merged, merged, ONE, room, other, count)
    out[3] = sums.inner_product(u, tau, ONE, room, other, count)
    dtype = t[ENTRY.param_dtype] if t[ENTRY.master_kind] == NO_MASTER else FP32
    weights = s[SCALAR.update_weight], s[SCALAR.tau_weight]
    _count(u, kept, tau, merged, row(scratch, START), dtype, t[ENTRY.consensus], *weights, count, counts)
