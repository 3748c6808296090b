"""F(tau) of a tensor, or of what a process holds of one."""

from __future__ import annotations

from torch import Tensor

from fused_merge.delta.tensors import Sparsity
from fused_merge.eager.shard import Shard
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import ELEMENTWISE, RANKED, SPARSIFY, kept_count, sparsify_tau, widened
from fused_merge.lockstep import finish, kth_largest


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
            k = kept_count(numel, sparsity.reserve_rate)
            kth = finish(kth_largest(lambda: widened(tau), k, shard.groups))
        elif sparsity.method not in (*RANKED, *ELEMENTWISE):
            raise ValueError(
                f"method {sparsity.method!r} is not known to work on parts of a tensor, and {name!r} is sharded; "
                f"save the delta with it first, or use one of {', '.join(n for n in SPARSIFY if n != 'none')}"
            )
        kept = sparsify_tau(tau, **options, elements=shard.elements, kth=kth)
    return SparseTensor.pack(kept, kept != 0)
