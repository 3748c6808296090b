"""One step of a merging optimizer for one tensor: theta += F(u) ⊕ F(tau).

The update u is AdamW's, or what another optimizer has added to the weights.

Source: Lu et al. 2024 (arXiv 2405.17931), algorithm 1 and its step-K variant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused_merge.eager import adamw, consensus, rounding
from fused_merge.eager.philox import MaskKey
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.projection import products, project
from fused_merge.eager.scalars import Scalars
from fused_merge.eager.sparsify import RANKED, SPARSIFY
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
    """What a merge starts from: the weights after the last one. A step mutates its tensors.

    Attributes:
        weights: those weights, in the shape of the parameter and the precision of its master.
        decay: 0-d: the product of (1 - lr*wd) since then; None where another optimizer steps.
        kept: whether the weights after this merge become the next anchor.

    Example:
        >>> import torch
        >>> from fused_merge.functional import Anchor, Hyper, merge_rule, merging_adamw_
        >>> w, tau, m, v, step = torch.zeros(1), torch.ones(1), torch.zeros(1), torch.zeros(1), torch.zeros(())
        >>> anchor, rule = Anchor(w.clone(), torch.ones(())), merge_rule("ondare", reserve_rate=1.0)
        >>> hyper = Hyper(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, alpha=0.5, merge_every=2)
        >>> for _ in range(2):  # the second step merges the updates of both, -0.2, with tau
        ...     states = [[x] for x in (w, torch.ones(1), m, v, step, tau)]
        ...     _ = merging_adamw_(*states, rule=rule, hyper=hyper, tensor_ids=[0], anchors=[anchor])
        >>> w, anchor.weights
        (tensor([0.4000]), tensor([0.4000]))
    """

    weights: Tensor
    decay: Tensor | None = None
    kept: bool = True


class Terms(NamedTuple):
    """What was merged, for `fused_merge.eager.merge_stats`."""

    u: Tensor
    u_kept: Tensor
    tau: Tensor
    merged: Tensor
    start: Tensor  # what the merged step was added to


def merging_adamw_(
    param: Tensor,
    grad: Tensor | None,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    delta: Delta | None,
    s: Scalars,
    rule: MergeRule,
    key: MaskKey,
    *,
    anchor: Anchor | None = None,
    master: Tensor | None = None,
    along: Tensor | None = None,
    kth: Tensor | None = None,
    keep_terms: bool = False,
) -> Terms | None:
    """Advance `param` and its state by one merged AdamW step, in place.

    Args:
        param: any floating dtype and strides; rounded once. Mutated, unless `s.moves` or `s.advances` is 0.
        grad: gradient of the shape of `param`, any floating dtype. None where another optimizer has stepped `param`:
            u is then all that it holds beyond the anchor.
        exp_avg: first moment, any floating dtype; mutated. None without a gradient.
        exp_avg_sq: second moment; mutated. None without a gradient.
        delta: the reference delta, or None: the step is then plain AdamW.
        s: the scalars of this step.
        rule: which elements of u are kept, how the two are merged, what is projected and how results are rounded.
        key: of the tensor's random numbers at this step.
        anchor: for merges at every K-th step and those of another optimizer's update; mutated. None merges at every
            step. Unused without a delta.
        master: fp32 copy of a 16-bit `param`, or int16 low halves of a bf16 one; mutated.
        along: `projected_products` of the logical tensor, where these are shards of it.
        kth: the pattern of the k-th largest magnitude of its u, the same.
        keep_terms: return what was merged, if there is a delta.
    """
    compute = compute_dtype(param.dtype)
    anchor = anchor if delta is not None else None
    flags = (s.advances, s.advances * s.moves, s.merges)
    advances, moves, merges = (torch.as_tensor(flag, device=param.device) != 0 for flag in flags)
    if grad is None or exp_avg is None or exp_avg_sq is None:
        assert anchor is not None
        start, moves = anchor.weights.to(compute), moves & merges
        u = projected(added_elsewhere(param, anchor, master, compute), delta, rule, "update", along)
    else:
        m, v, u = fresh_update(grad, exp_avg, exp_avg_sq, delta, s, rule, compute, along)
        start = _load(param, master, compute) * s.decay
        _write(exp_avg, m, advances)
        _write(exp_avg_sq, v, advances)
    merged, terms = u, None
    if delta is not None:
        if anchor is not None and anchor.decay is not None:
            # A merge starts from c*anchor and takes what came since; between merges this is plain AdamW.
            origin, since = _since_anchor(start, u, anchor, s)
            start, u = torch.where(merges, origin, start), torch.where(merges, since, u)
        tau = delta.tau.to(compute)
        u_kept = SPARSIFY[rule.update](u, rule.reserve_rate, key) if kth is None else RANKED[rule.update](u, kth)
        merged = CONSENSUS[rule.consensus](u_kept, tau, s.update_weight, s.tau_weight)
        if anchor is not None:
            merged = torch.where(merges, merged, u)
        if keep_terms:
            terms = Terms(u, u_kept, tau, merged, start)

    # Nothing to add changes no bit, not even that of -0: such weights need not be written at all.
    theta = torch.where(merged == 0, start, start + merged)
    stored, stored_master = theta, theta
    if master is not None and master.dtype == torch.int16:
        stored, stored_master = rounding.split(theta)
    elif rule.rounding == "stochastic":
        _, error = rounding.two_sum(start, merged)
        stored = rounding.stochastic(theta, error, param.dtype, key)
    _write(param, stored, moves)
    if master is not None:
        _write(master, stored_master, moves)
    if anchor is not None and anchor.kept:
        _write(anchor.weights, _load(param, master, compute), moves & merges)
    if anchor is not None and anchor.decay is not None:
        _write(anchor.decay, torch.where(merges, 1.0, anchor.decay * s.decay), moves)
    return terms


def added_elsewhere(param: Tensor, anchor: Anchor, master: Tensor | None, compute: torch.dtype) -> Tensor:
    """Return what another optimizer has added to the anchor: its u."""
    return _load(param, master, compute) - anchor.weights.to(compute)


def fresh_update(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    delta: Delta | None,
    s: Scalars,
    rule: MergeRule,
    compute: torch.dtype,
    along: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the moments after this step and u, with what is projected projected; nothing is changed."""
    g = projected(s.grad_factor * grad.to(compute), delta, rule, "gradient", along)
    m, v = adamw.moments(g, exp_avg.to(compute), exp_avg_sq.to(compute), s)
    return m, v, projected(adamw.update(m, v, s), delta, rule, "update", along)


def projected(x: Tensor, delta: Delta | None, rule: MergeRule, on: str, along: Tensor | None) -> Tensor:
    """Return a gradient or an update, projected if the rule projects it."""
    if delta is None or delta.tau_dense is None or rule.project is None or rule.project_on != on:
        return x
    tau, rows, how, ascent = delta.tau_dense.to(x.dtype), rule.project_over == "rows", rule.project, on == "gradient"
    return project(x, tau, how, strength=rule.project_strength, rows=rows, ascent=ascent, along=along)


def projected_products(
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    tau: Tensor,
    s: Scalars,
    rule: MergeRule,
    compute: torch.dtype,
) -> Tensor:
    """Return <x, tau> and <tau, tau> of what a step projects, as `projection.products`; nothing is changed."""
    x = s.grad_factor * grad.to(compute)
    if rule.project_on == "update":
        x = adamw.update(*adamw.moments(x, exp_avg.to(compute), exp_avg_sq.to(compute), s), s)
    return products(x, tau.to(compute), rows=rule.project_over == "rows")


def update_since_merge(u: Tensor, param: Tensor, anchor: Anchor | None, master: Tensor | None, s: Scalars) -> Tensor:
    """Return the u that F sees at a merge: that of this step, or of all steps since the last merge of step-K."""
    return u if anchor is None else _since_anchor(_load(param, master, u.dtype) * s.decay, u, anchor, s)[1]


def _since_anchor(decayed: Tensor, u: Tensor, anchor: Anchor, s: Scalars) -> tuple[Tensor, Tensor]:
    """Return where a merge of step-K starts, c*anchor, and the update since the last one."""
    assert anchor.decay is not None
    origin = (anchor.decay * s.decay) * anchor.weights.to(u.dtype)
    return origin, decayed + u - origin


def _load(param: Tensor, master: Tensor | None, compute: torch.dtype) -> Tensor:
    """Return the weights in full precision; a weight that was changed from outside overrules its fp32 master."""
    if master is None:
        return param.to(compute)
    if master.dtype == torch.int16:
        return rounding.join(param, master)
    return torch.where(master.to(param.dtype) == param, master, param.to(compute))


def _write(out: Tensor, value: Tensor, where: Tensor) -> None:
    """Round `value` to the dtype of `out` and write it, or leave every bit as it is."""
    out.copy_(torch.where(where, value.to(out.dtype), out))
