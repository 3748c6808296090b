"""What is logged when deltas are bound: what steps plainly, what dense deltas cost, what rounding will lose."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.merge_stats import lost_share
from fused_merge.eager.sparse import SparseTensor
from fused_merge.methods import MergeRule
from fused_merge.names import some
from fused_merge.optim.pieces import Bound

logger = logging.getLogger("fused_merge")

# A merge that loses more than this of what it adds to rounding is not the merge that was asked for.
_LOST = 0.2


class Found(NamedTuple):
    """A parameter, what its group says, and the delta that was found for it."""

    name: str
    shape: Sequence[int]  # of the tensor, in whole
    weights: Tensor  # what this process holds of it
    options: Mapping[str, Any]
    rule: MergeRule
    delta: Bound


def report(found: Sequence[Found]) -> None:
    """Log all that a user should know of deltas that were just bound."""
    plain = [each.name for each in found if each.delta.tau is None]
    plain += [
        f"rows {each.delta.shape[0]} to {each.shape[0] - 1} of {each.name}"
        for each in found
        if each.delta.tau is not None and each.delta.shape != each.shape
    ]
    if plain:
        logger.warning("stepping as plain AdamW, without a reference delta: %s", some(map(repr, plain), shown=20))
    dense = sum(each.delta.tau_dense.nbytes for each in found if each.delta.tau_dense is not None)
    if dense:
        logger.info("projection keeps the dense reference delta in memory: %.3g MB", dense / 1e6)
    _warn_of_lost_additions(found)


def _warn_of_lost_additions(found: Sequence[Found]) -> None:
    """Warn where the weights are too coarse for alpha * tau, or for u, which is about as large as the learning rate."""
    lost_tau: dict[str, Tensor] = {}
    lost_u: dict[str, Tensor] = {}
    for name, _, weights, options, rule, (tau, *_) in found:
        if options["rounding"] == "stochastic":
            continue
        stored = weights.dtype if options["master"] == "none" else torch.float32
        if tau is not None and options["alpha"] != 0.0:
            tau = tau.unpack() if isinstance(tau, SparseTensor) else tau
            merged = weights[: tau.shape[0]] if tau.ndim else weights
            lost_tau[name] = lost_share(merged, tau, options["alpha"] * rule.scale(rule.tau_reserve_rate), stored)
        if size := _size_of_update(options, rule, merged=tau is not None):
            lost_u[name] = lost_share(weights, weights.new_ones(()).expand_as(weights), size, stored)
    _warn_of(lost_tau, "alpha * tau", "kept entries", "alpha")
    _warn_of(lost_u, "an update as large as lr", "elements", "lr")


def _size_of_update(options: Mapping[str, Any], rule: MergeRule, *, merged: bool) -> float:
    """Return how large an element of AdamW's updates is at most, or nearly so, when it is added; 0 if unknown."""
    # A warm-up begins at 0; where it leads, schedulers keep in the group.
    lr = max(float(options["lr"]), float(options.get("initial_lr", 0.0)))
    if merged and options["merge_every"] == 1:
        lr *= (1.0 - float(options["alpha"])) * rule.scale(rule.reserve_rate)
    return lr


def _warn_of(shares: Mapping[str, Tensor], what: str, elements: str, option: str) -> None:
    lost = {name: float(share) for name, share in shares.items() if share > _LOST}
    if lost:
        worst = max(lost, key=lambda name: lost[name])
        logger.warning(
            "adding %s will change no bit for more than %.0f %% of the %s of %d tensors (%.0f %% of %r): the weights "
            "are too coarse for it; use rounding='stochastic', a larger %s or, for 16-bit weights, a master",
            *(what, 100 * _LOST, elements, len(lost), 100 * lost[worst], worst, option),
        )
