"""⊕: how a sparsified update and a sparsified reference delta become one step.

Each function takes u and tau (equal shapes, computed in fp32 or fp64) and the weights of the weighted sum,
(1 - alpha) for u and alpha for tau, and returns the merged step.

Source: Lu et al. 2024 (arXiv 2405.17931), equation 4 (linear) and equations 5-7 (sign consensus).
"""

from __future__ import annotations

import torch
from torch import Tensor

Weight = float | Tensor


def linear(u: Tensor, tau: Tensor, update_weight: Weight, tau_weight: Weight) -> Tensor:
    """Return (1 - alpha) * u + alpha * tau (equation 4)."""
    return update_weight * u + tau_weight * tau


def sign_reference(u: Tensor, tau: Tensor, update_weight: Weight, tau_weight: Weight) -> Tensor:
    """Return the weighted sum of what has the sign of u + tau.

    The vote is the sign of the *unweighted* sum, a tie counting as +, as in the authors' published code, with which
    their tables were made. A NaN opposes nothing and stays.
    """
    positive = u + tau >= 0
    u = torch.where(torch.where(positive, u < 0, u > 0), 0.0, u)
    tau = torch.where(torch.where(positive, tau < 0, tau > 0), 0.0, tau)
    return linear(u, tau, update_weight, tau_weight)


def sign_paper(u: Tensor, tau: Tensor, update_weight: Weight, tau_weight: Weight) -> Tensor:
    """Return a + b where the signs of a = (1 - alpha) * u and b = alpha * tau agree, else the larger one.

    This is the vote as printed (equations 5-7): two opposite terms of equal magnitude cancel.
    """
    a, b = update_weight * u, tau_weight * tau
    conflict = ((a > 0) & (b < 0)) | ((a < 0) & (b > 0))
    a_kept = torch.where(conflict & (a.abs() < b.abs()), 0.0, a)
    b_kept = torch.where(conflict & (b.abs() < a.abs()), 0.0, b)
    return a_kept + b_kept
