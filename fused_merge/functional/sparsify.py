"""F(tau) of a tensor, or of what a process holds of one."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_merge.eager.shard import Shard
from fused_merge.eager.sparse import SparseTensor
from fused_merge.eager.sparsify import ELEMENTWISE, RANKED, SPARSIFY, kept_count, sparsify_tau, widened
from fused_merge.functional import backend
from fused_merge.lockstep import finish, kth_largest
from fused_merge.names import tensor_id


@torch.no_grad()
def sparsify(
    tau: Tensor,
    *,
    name: str,
    method: str,
    reserve_rate: float,
    seed: int,
    shard: Shard | None = None,
    numel: int | None = None,
    work: int | None = None,
    impl: str = "auto",
) -> SparseTensor:
    """Return F(tau) of one tensor, unscaled, as it is stored.

    Args:
        tau: dense, any floating dtype: the whole tensor, or the part of it that `shard` describes.
        name: of the tensor; its canonical form keys the random mask.
        method: F, a key of `fused_merge.eager.sparsify.SPARSIFY`.
        reserve_rate: p, the share to keep, in (0, 1].
        seed: of random masks.
        shard: where the elements of a part lie, and who holds the others; None for a whole tensor. The processes that
            hold a tensor find the threshold of a ranked F together: all of them must come here.
        numel: elements of the whole delta, of which k is a share; None where those are the elements of `shard`, and not
            fewer, as where a model was given more rows.
        work: `backend.work` of all tensors that will be sparsified one after the other; None for this one alone.
        impl: `"auto"`, `"compiled"` or `"eager"`. Compiled code serves bf16, fp16 and fp32 on a CPU; `"auto"` chooses
            it by `work`, where that is enough to do.

    Returns:
        What is kept, in the dtype and on the device of `tau`; `unpack()` of it is dense.

    Raises:
        ValueError: if there is no such F, or one that is not known to need nothing of the other parts but a threshold.
        RuntimeError: if `impl="compiled"` cannot run here, or does not serve this tensor.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> tau = torch.tensor([1.0, -3.0, 2.0, 0.5])
        >>> kept = fm.functional.sparsify(tau, name="w", method="magnitude", reserve_rate=0.5, seed=0)
        >>> kept.values
        tensor([-3.,  2.])
        >>> kept.unpack()
        tensor([ 0., -3.,  2.,  0.])
    """
    if shard is not None and method in SPARSIFY and method not in (*RANKED, *ELEMENTWISE):
        raise ValueError(
            f"method {method!r} is not known to work on parts of a tensor, and {name!r} is sharded; "
            f"save the delta with it first, or use one of {', '.join(n for n in SPARSIFY if n != 'none')}"
        )
    own = Shard.whole(tau.shape) if shard is None else shard
    numel = own.numel if numel is None else numel
    k = kept_count(numel, reserve_rate)
    ranked = method in RANKED and reserve_rate < 1.0 and numel > 0
    chosen = {tau.device: backend.resolve(impl, tau.device, numel if work is None else work)}
    reason = None
    if chosen[tau.device] == "compiled":
        from fused_merge.compiled import sparsify as compiled

        reason = compiled.why_unsupported(tau, method)
    (share,) = backend.group(impl, chosen, [tau], [repr(name)], [reason])
    if share.backend == "compiled":
        delta = compiled.Delta(tau)
        pattern = finish(delta.kth_largest(k, own.groups)) if ranked else 0
        return delta.sparsify(
            method, reserve_rate, kth=pattern, seed=seed, tensor_id=tensor_id(name), elements=own.elements
        )
    # Of a whole tensor F finds the threshold itself.
    kth = finish(kth_largest(lambda: widened(tau), k, own.groups)) if ranked and shard is not None else None
    kept = sparsify_tau(
        tau,
        name=name,
        method=method,
        reserve_rate=reserve_rate,
        seed=seed,
        elements=None if shard is None else own.elements,
        kth=kth,
    )
    return SparseTensor.pack(kept, kept != 0)
