"""What a merge did to one tensor, in numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.merging_adamw import CONSENSUS, Terms
from fused_merge.eager.precision import compute_dtype, sqrt_rn
from fused_merge.eager.scalars import Scalars
from fused_merge.eager.sums import inner_product
from fused_merge.methods import MergeRule


class MergeStats(NamedTuple):
    """What a merge did to one tensor: 0-d tensors in the dtype of the computation; shares lie in [0, 1].

    Attributes:
        cosine: of u and F(tau); 0 where either is zero.
        kept_u: share of elements that F(u) keeps.
        kept_tau: share of elements that F(tau) keeps.
        conflicts: share of opposite signs among the elements where u and F(tau) are both not zero.
        norm_u: norm of u.
        norm_tau: norm of F(tau), unscaled.
        norm_merged: norm of F(u) ⊕ F(tau).
        lost: share of the kept entries of tau whose addition changed no bit of the weight.
        lost_u: the same of u.

    Example:
        >>> import torch
        >>> from fused_merge.functional import Hyper, merge_rule, merging_adamw_
        >>> w, tau = torch.zeros(2), torch.tensor([1.0, -1.0])
        >>> states = [[x] for x in (w, torch.ones(2), torch.zeros(2), torch.zeros(2), torch.zeros(()), tau)]
        >>> rule = merge_rule("ondare", reserve_rate=1.0)
        >>> hyper = Hyper(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, alpha=0.5)
        >>> (stats,) = merging_adamw_(*states, rule=rule, hyper=hyper, tensor_ids=[0], stats=True)
        >>> stats.conflicts, stats.norm_tau
        (tensor(0.5000), tensor(1.4142))
    """

    cosine: Tensor
    kept_u: Tensor
    kept_tau: Tensor
    conflicts: Tensor
    norm_u: Tensor
    norm_tau: Tensor
    norm_merged: Tensor
    lost: Tensor
    lost_u: Tensor


class MergeSums(NamedTuple):
    """What is added up over a tensor: inner products by the defined tree, and counts (int64); all 0-d."""

    u_u: Tensor
    tau_tau: Tensor
    merged_merged: Tensor
    u_tau: Tensor
    kept_u: Tensor
    kept_tau: Tensor
    both: Tensor  # u and F(tau) are not zero
    opposed: Tensor  # of these, those of opposite signs
    unchanged: Tensor  # of the kept entries of tau, those whose addition changed no bit
    unchanged_u: Tensor  # of the kept entries of u, the same


def merge_sums(terms: Terms, s: Scalars, rule: MergeRule, stored: torch.dtype) -> MergeSums:
    """Add up one merge; `stored` is the dtype of the weight, or of its master where it has one."""
    u, tau = terms.u, terms.tau
    both, kept_u, kept_tau = (u != 0) & (tau != 0), terms.u_kept != 0, tau != 0
    consensus = CONSENSUS[rule.consensus]
    only_u = consensus(terms.u_kept, tau, s.update_weight, 0.0)
    only_tau = consensus(terms.u_kept, tau, 0.0, s.tau_weight)
    weight, with_u, with_tau = ((terms.start + step).to(stored) for step in (terms.merged, only_u, only_tau))
    return MergeSums(
        u_u=inner_product(u, u),
        tau_tau=inner_product(tau, tau),
        merged_merged=inner_product(terms.merged, terms.merged),
        u_tau=inner_product(u, tau),
        kept_u=kept_u.sum(),
        kept_tau=kept_tau.sum(),
        both=both.sum(),
        opposed=(both & ((u > 0) != (tau > 0))).sum(),
        unchanged=(kept_tau & (weight == with_u)).sum(),
        unchanged_u=(kept_u & (weight == with_tau)).sum(),
    )


def merge_stats(sums: MergeSums, numel: int) -> MergeStats:
    """Return the statistics of one merge of a tensor of `numel` elements."""
    norm_u, norm_tau, norm_merged = map(sqrt_rn, (sums.u_u, sums.tau_tau, sums.merged_merged))
    norms = norm_u * norm_tau
    return MergeStats(
        cosine=torch.where(norms > 0, sums.u_tau / torch.where(norms > 0, norms, 1.0), 0.0),
        kept_u=sums.kept_u / max(numel, 1),
        kept_tau=sums.kept_tau / max(numel, 1),
        conflicts=sums.opposed / sums.both.clamp(min=1),
        norm_u=norm_u,
        norm_tau=norm_tau,
        norm_merged=norm_merged,
        lost=sums.unchanged / sums.kept_tau.clamp(min=1),
        lost_u=sums.unchanged_u / sums.kept_u.clamp(min=1),
    )


def lost_share(param: Tensor, tau: Tensor, tau_weight: float, stored: torch.dtype) -> Tensor:
    """Return the share of the kept entries of F(tau) that, added alone, would change no bit of `param`.

    Args:
        param: the weights.
        tau: F(tau), of the same shape.
        tau_weight: what it is multiplied by.
        stored: dtype of the weight, or of its master.
    """
    wide = param.to(compute_dtype(param.dtype))
    unchanged = (wide + tau_weight * tau.to(wide.dtype)).to(stored) == wide.to(stored)
    kept = tau != 0
    return (kept & unchanged).sum() / kept.sum().clamp(min=1)
