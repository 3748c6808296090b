"""One step of a merging optimizer for one tensor: theta += F(u) ⊕ F(tau).

Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1, with the AdamW convention of `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fused_merge.eager import adamw, consensus
from fused_merge.eager.philox import DOMAIN_UPDATE, keep_mask
from fused_merge.eager.scalars import Scalars
from fused_merge.eager.sparsify import magnitude_mask, sparsify
from fused_merge.methods import MergeRule
from fused_merge.sharding import ShardIndex

CONSENSUS: dict[str, Callable[[Tensor, Tensor, consensus.Weight, consensus.Weight], Tensor]] = {
    "linear": consensus.linear,
    "sign_reference": consensus.sign_reference,
    "sign_paper": consensus.sign_paper,
}


def merging_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    tau: Tensor | None,
    s: Scalars,
    rule: MergeRule,
    *,
    seed: int,
    tensor_id: int,
    shard: ShardIndex | None = None,
) -> None:
    """Advance `param` and its moments by one merged AdamW step, in place.

    Args:
        param: any floating dtype and strides; rounded once to nearest. Mutated, unless `s.moves` is 0.
        grad: gradient of the shape of `param`, any floating dtype.
        exp_avg: first moment; mutated.
        exp_avg_sq: second moment; mutated.
        tau: F(tau), the reference delta already sparsified, or None: the step is then plain AdamW.
        s: the scalars of this step.
        rule: which elements of u are kept, and how the two are merged.
        seed: key of the random mask of u.
        tensor_id: `fused_merge.names.tensor_id` of the tensor's name.
        shard: where a local shard lies in the unsharded tensor.
    """
    compute = adamw.compute_dtype(param.dtype)
    m, v = adamw.moments(grad.to(compute), exp_avg.to(compute), exp_avg_sq.to(compute), s)
    step = adamw.update(m, v, s)
    if tau is not None:
        keep = _keep(step, s, rule, seed=seed, tensor_id=tensor_id, shard=shard)
        step = CONSENSUS[rule.consensus](
            step if keep is None else sparsify(step, keep), tau.to(compute), s.update_weight, s.tau_weight
        )
    theta = param.to(compute) * s.decay + step
    exp_avg.copy_(m)
    exp_avg_sq.copy_(v)
    moves = torch.as_tensor(s.moves, device=param.device) != 0
    param.copy_(torch.where(moves, theta.to(param.dtype), param))


def _keep(
    u: Tensor, s: Scalars, rule: MergeRule, *, seed: int, tensor_id: int, shard: ShardIndex | None
) -> Tensor | None:
    """Return which elements of u take part, None for all of them."""
    if rule.update == "none" or rule.reserve_rate == 1.0:
        return None
    if rule.update == "magnitude":
        return magnitude_mask(u, rule.reserve_rate)
    step = s.step.to(torch.int64) if isinstance(s.step, Tensor) else int(s.step)
    return keep_mask(
        u.numel(),
        rule.reserve_rate,
        seed=seed,
        step=step,
        tensor_id=tensor_id,
        domain=DOMAIN_UPDATE,
        shard=shard,
        device=u.device,
    ).view(u.shape)
