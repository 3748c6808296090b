"""⊕ on loaded values, as in `fused_merge/eager/consensus.py`; a new consensus is a function and a line of `merge`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear(u, tau, update_weight, tau_weight):
    """`eager.consensus.linear`: (1 - alpha)*u + alpha*tau."""
    return update_weight * u + tau_weight * tau


@triton.jit
def sign_reference(u, tau, update_weight, tau_weight):
    """`eager.consensus.sign_reference`: the weighted sum of what has the sign of u + tau."""
    positive = u + tau >= 0
    u = tl.where(tl.where(positive, u < 0, u > 0), 0.0, u)
    tau = tl.where(tl.where(positive, tau < 0, tau > 0), 0.0, tau)
    return linear(u, tau, update_weight, tau_weight)


@triton.jit
def sign_paper(u, tau, update_weight, tau_weight):
    """`eager.consensus.sign_paper`: the sum of the weighted terms, or the larger one where their signs differ."""
    a = update_weight * u
    b = tau_weight * tau
    conflict = ((a > 0) & (b < 0)) | ((a < 0) & (b > 0))
    a_kept = tl.where(conflict & (tl.abs(a) < tl.abs(b)), 0.0, a)
    b_kept = tl.where(conflict & (tl.abs(b) < tl.abs(a)), 0.0, b)
    return a_kept + b_kept


@triton.jit
def merge(u, tau, update_weight, tau_weight, CONSENSUS: tl.constexpr):
    """u ⊕ tau by the consensus of that name."""
    if CONSENSUS == "linear":
        return linear(u, tau, update_weight, tau_weight)
    elif CONSENSUS == "sign_reference":
        return sign_reference(u, tau, update_weight, tau_weight)
    else:
        tl.static_assert(CONSENSUS == "sign_paper")
        return sign_paper(u, tau, update_weight, tau_weight)
