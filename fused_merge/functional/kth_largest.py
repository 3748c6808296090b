"""The k-th largest magnitudes of sharded tensors, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fused_merge.eager.kth_largest import bin_counts, bin_shifts, narrow
from fused_merge.eager.shard import Shard
from fused_merge.eager.sparsify import kept_count, pattern
from fused_merge.lockstep import LocalSum, Steps, side_by_side


def kth_largest(locals_: Iterable[Callable[[], Tensor]], shards: Sequence[Shard], rate: float) -> Steps[list[Tensor]]:
    """Find the pattern of the k-th largest magnitude of each logical tensor, k = max(1, floor(p*n)); 0-d.

    Args:
        locals_: return the local elements of each tensor, fp32 or fp64. They are called once a round, so that no more
            than one tensor is in memory.
        shards: what they are of the logical tensors.
        rate: p, the share to keep.
    """
    search = [_search(local, shard, rate) for local, shard in zip(locals_, shards, strict=True)]
    found: list[Tensor] = yield from side_by_side(search)
    return found


def _search(local: Callable[[], Tensor], shard: Shard, rate: float) -> Steps[Tensor]:
    patterns = pattern(local())
    low, rank = patterns.new_zeros(()), torch.tensor(kept_count(shard.numel, rate), device=patterns.device)
    for shift in bin_shifts(patterns.dtype):
        counts = bin_counts(patterns, low, shift)
        del patterns
        yield [LocalSum(counts, shard.groups)]
        low, rank = narrow(counts, low, rank, shift)
        patterns = pattern(local()) if shift else low
    return low
