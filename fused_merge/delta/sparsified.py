"""F(tau) of a tensor, or of what a process holds of one."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_merge.delta.tensors import Sparsity
from fused_merge.distributed import sum_over
from fused_merge.eager.kth_largest import bin_counts, narrow, shifts
from fused_merge.eager.shard import Shard
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import RANKED, SPARSIFY, kept_count, pattern, sparsify_tau, widened


def sparsified(name: str, tau: Tensor, numel: int, sparsity: Sparsity, shard: Shard | None) -> SparseTensor:
    """Return F(tau) of one tensor.

    Args:
        name: of the tensor, canonical.
        tau: dense, any floating dtype: the whole tensor, or the part of it that `shard` describes.
        numel: elements of the whole tensor.
        sparsity: F, and how much it keeps.
        shard: where the elements of a part lie, and who holds the others; None for a whole tensor.

    Raises:
        ValueError: if F is not known to need nothing of the other parts but a threshold.
    """
    options = {"name": name, **sparsity._asdict()}
    if shard is None:
        kept = sparsify_tau(tau, **options)
    else:
        kth = None
        if sparsity.method in RANKED and sparsity.reserve_rate < 1.0 and numel > 0:
            kth = _threshold(tau, kept_count(numel, sparsity.reserve_rate), shard)
        elif sparsity.method not in RANKED and sparsity.method != "random":
            raise ValueError(
                f"method {sparsity.method!r} is not known to work on parts of a tensor, and {name!r} is sharded; "
                f"save the delta with it first, or use one of {', '.join(n for n in SPARSIFY if n != 'none')}"
            )
        kept = sparsify_tau(tau, **options, elements=shard.elements, kth=kth)
    return SparseTensor.pack(kept, kept != 0)


def _threshold(tau: Tensor, k: int, shard: Shard) -> Tensor:
    """Return the pattern of the k-th largest magnitude of all parts of a tensor, 0-d."""
    patterns = pattern(widened(tau))
    low, rank = (torch.tensor(x, device=tau.device) for x in (0, k))
    for shift in shifts(patterns.dtype):
        counts = sum_over(bin_counts(patterns, low, shift), shard.groups)
        low, rank = narrow(counts, low, rank, shift)
    return low.to(patterns.dtype)
