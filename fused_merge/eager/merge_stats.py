"""What a merge did to one tensor, in numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.merging_adamw import CONSENSUS, Terms
from fused_merge.eager.scalars import Scalars
from fused_merge.eager.sums import inner_product
from fused_merge.methods import MergeRule


class MergeStats(NamedTuple):
    """0-d tensors in the dtype of the computation; shares lie in [0, 1]."""

    cosine: Tensor  # of u and F(tau); 0 where either is zero
    kept_u: Tensor  # share of elements that F(u) keeps
    kept_tau: Tensor  # share of elements that F(tau) keeps
    conflicts: Tensor  # share of opposite signs among the elements where u and F(tau) are both not zero
    norm_u: Tensor
    norm_tau: Tensor  # of F(tau), unscaled
    norm_merged: Tensor
    lost: Tensor  # share of the kept entries of tau whose addition changed no bit of the weight


def merge_stats(terms: Terms, s: Scalars, rule: MergeRule, stored: torch.dtype) -> MergeStats:
    """Return the statistics of one merge.

    Args:
        terms: what was merged.
        s: the scalars of the step.
        rule: how it was merged.
        stored: dtype of the weight, or of its master where it has one.
    """
    u, tau = terms.u, terms.tau
    norm_u, norm_tau, norm_merged = (inner_product(x, x).sqrt() for x in (u, tau, terms.merged))
    norms = norm_u * norm_tau
    both, kept_tau = (u != 0) & (tau != 0), tau != 0
    without = CONSENSUS[rule.consensus](terms.u_kept, tau, s.update_weight, 0.0)
    unchanged = (terms.start + terms.merged).to(stored) == (terms.start + without).to(stored)
    return MergeStats(
        cosine=torch.where(norms > 0, inner_product(u, tau) / torch.where(norms > 0, norms, 1.0), 0.0),
        kept_u=_share(terms.u_kept != 0, torch.ones_like(both)),
        kept_tau=_share(kept_tau, torch.ones_like(both)),
        conflicts=_share((u > 0) != (tau > 0), both),
        norm_u=norm_u,
        norm_tau=norm_tau,
        norm_merged=norm_merged,
        lost=_share(unchanged, kept_tau),
    )


def lost_share(param: Tensor, tau: Tensor, tau_weight: float, stored: torch.dtype) -> Tensor:
    """Return the share of the kept entries of tau that, added alone, would change no bit of `param`.

    Args:
        param: the weights.
        tau: F(tau), of the same shape.
        tau_weight: what it is multiplied by.
        stored: dtype of the weight, or of its master.
    """
    wide = param.to(torch.promote_types(param.dtype, torch.float32))
    unchanged = (wide + tau_weight * tau.to(wide.dtype)).to(stored) == wide.to(stored)
    return _share(unchanged, tau != 0)


def _share(condition: Tensor, among: Tensor) -> Tensor:
    """Return how much of `among` fulfils the condition, 0 where there is nothing."""
    total = among.sum()
    return (condition & among).sum() / total.clamp(min=1)
