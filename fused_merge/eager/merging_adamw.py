"""One step of a merging optimizer for one tensor: theta += F(u) ⊕ F(tau).

Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1 and, for merges at every K-th step, its step-K variant, with
the AdamW convention of `torch.optim.AdamW`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_merge.eager import adamw, consensus, rounding
from fused_merge.eager.philox import MaskKey
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.projection import project
from fused_merge.eager.scalars import Scalars
from fused_merge.eager.sparsify import SPARSIFY
from fused_merge.methods import MergeRule

CONSENSUS: dict[str, Callable[[Tensor, Tensor, consensus.Weight, consensus.Weight], Tensor]] = {
    "linear": consensus.linear,
    "sign_reference": consensus.sign_reference,
    "sign_paper": consensus.sign_paper,
}


class Delta(NamedTuple):
    """The reference delta of one tensor as a step needs it."""

    tau: Tensor  # F(tau)
    tau_dense: Tensor | None = None  # tau itself, where something is projected onto it


class Anchor(NamedTuple):
    """What step-K keeps between merges."""

    weights: Tensor  # the weights after the last merge, in the precision of the master
    decay: Tensor  # 0-d: the product of (1 - lr*wd) since then


class Terms(NamedTuple):
    """What was merged, for `fused_merge.eager.merge_stats`."""

    u: Tensor
    u_kept: Tensor
    tau: Tensor
    merged: Tensor
    start: Tensor  # what the merged step was added to


def merging_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    delta: Delta | None,
    s: Scalars,
    rule: MergeRule,
    key: MaskKey,
    *,
    anchor: Anchor | None = None,
    master: Tensor | None = None,
    keep_terms: bool = False,
) -> Terms | None:
    """Advance `param` and its state by one merged AdamW step, in place.

    Args:
        param: any floating dtype and strides; rounded once. Mutated, unless `s.moves` or `s.advances` is 0.
        grad: gradient of the shape of `param`, any floating dtype.
        exp_avg: first moment, any floating dtype; mutated.
        exp_avg_sq: second moment; mutated.
        delta: the reference delta, or None: the step is then plain AdamW.
        s: the scalars of this step.
        rule: which elements of u are kept, how the two are merged, what is projected and how results are rounded.
        key: of the tensor's random numbers at this step.
        anchor: for merges at every K-th step; mutated. None merges at every step. Unused without a delta.
        master: fp32 copy of a 16-bit `param`, or int16 low halves of a bf16 one; mutated.
        keep_terms: also return what was merged.

    Returns:
        What was merged, if asked for and there is a delta.
    """
    compute = compute_dtype(param.dtype)
    anchor = anchor if delta is not None else None
    g = s.grad_factor * grad.to(compute)
    tau_dense = None if delta is None or delta.tau_dense is None else delta.tau_dense.to(compute)
    if tau_dense is not None and rule.project and rule.project_on == "gradient":
        g = _projected(g, tau_dense, rule, ascent=True)
    m, v = adamw.moments(g, exp_avg.to(compute), exp_avg_sq.to(compute), s)
    u = adamw.update(m, v, s)
    if tau_dense is not None and rule.project and rule.project_on == "update":
        u = _projected(u, tau_dense, rule, ascent=False)

    theta = _load(param, master, compute)
    start, merged, terms = theta * s.decay, u, None
    if delta is not None:
        if anchor is not None:
            start, u = _since_anchor(start, u, anchor, s)
        tau = delta.tau.to(compute)
        u_kept = SPARSIFY[rule.update](u, rule.reserve_rate, key)
        merged = CONSENSUS[rule.consensus](u_kept, tau, s.update_weight, s.tau_weight)
        if anchor is not None:
            merged = torch.where(_flag(s.merges, param), merged, u)
        if keep_terms:
            terms = Terms(u, u_kept, tau, merged, start)

    advances = _flag(s.advances, param)
    moves = advances & _flag(s.moves, param)
    _write(exp_avg, m, advances)
    _write(exp_avg_sq, v, advances)
    _store(param, master, start, merged, rule, key, moves)
    if anchor is not None:
        merges = moves & _flag(s.merges, param)
        _write(anchor.weights, _load(param, master, compute), merges)
        _write(anchor.decay, torch.where(merges, 1.0, anchor.decay * s.decay), moves)
    return terms


def _projected(x: Tensor, tau: Tensor, rule: MergeRule, *, ascent: bool) -> Tensor:
    assert rule.project is not None
    return project(
        x, tau, rule.project, strength=rule.project_strength, rows=rule.project_over == "rows", ascent=ascent
    )


def _since_anchor(decayed: Tensor, u: Tensor, anchor: Anchor, s: Scalars) -> tuple[Tensor, Tensor]:
    """Return where the next merge starts, c*anchor, and the update since then, theta_decayed + u - c*anchor.

    Between merges the two are the weights and the update of this step: plain AdamW.
    """
    origin = (anchor.decay * s.decay) * anchor.weights.to(u.dtype)
    merges = _flag(s.merges, u)
    return torch.where(merges, origin, decayed), torch.where(merges, decayed + u - origin, u)


def _load(param: Tensor, master: Tensor | None, compute: torch.dtype) -> Tensor:
    """Return the weights in full precision; a weight that was changed from outside overrules its fp32 master."""
    if master is None:
        return param.to(compute)
    if master.dtype == torch.int16:
        return rounding.join(param, master)
    return torch.where(master.to(param.dtype) == param, master, param.to(compute))


def _store(
    param: Tensor,
    master: Tensor | None,
    start: Tensor,
    merged: Tensor,
    rule: MergeRule,
    key: MaskKey,
    moves: Tensor,
) -> None:
    """Write start + merged where the weights move, rounded once."""
    # Nothing to add changes no bit, not even that of -0: such weights need not be written at all.
    theta = torch.where(merged == 0, start, start + merged)
    if master is not None and master.dtype == torch.int16:
        high, low = rounding.split(theta)
        _write(param, high, moves)
        _write(master, low, moves)
    elif rule.rounding == "stochastic":
        _, error = rounding.two_sum(start, merged)
        _write(param, rounding.stochastic(theta, error, param.dtype, key), moves)
    else:
        _write(param, theta, moves)
        if master is not None:
            _write(master, theta, moves)


def _flag(scalar: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(scalar, device=like.device) != 0


def _write(out: Tensor, value: Tensor, where: Tensor) -> None:
    """Round `value` to the dtype of `out` and write it, or leave every bit as it is."""
    out.copy_(torch.where(where, value.to(out.dtype), out))
