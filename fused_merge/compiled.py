"""The eager step through `torch.compile`: the same code and the same bits, fused for the CPU.

Inductor neither contracts nor reorders floating-point arithmetic on a CPU, so that what it makes of
`fused_merge.eager.merging_adamw` is equal to it bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_merge.eager.merging_adamw import Anchor, Delta, Terms
from fused_merge.eager.merging_adamw import merging_adamw_ as eager_merging_adamw_
from fused_merge.eager.philox import MaskKey
from fused_merge.eager.scalars import Scalars
from fused_merge.methods import MergeRule
from fused_merge.sharding import ShardIndex

logger = logging.getLogger("fused_merge")


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
    """Do what `fused_merge.eager.merging_adamw.merging_adamw_` does, compiled when it is first needed."""
    if param.numel() < 2 or param.dtype == torch.float64:
        # Sizes 0 and 1 would be compiled for themselves. And torch's own fp64 square root may be a unit in the last
        # place off where Inductor's is not: fp64 is defined by the eager code.
        return eager_merging_adamw_(
            param, grad, exp_avg, exp_avg_sq, delta, s, rule, key, anchor=anchor, master=master, keep_terms=keep_terms
        )
    key = key._replace(shard=key.shard or ShardIndex.whole(param.numel()))
    tensors = [param, grad, exp_avg, exp_avg_sq]
    every = [*tensors, *(t for t in (*(delta or ()), anchor and anchor.weights, master) if t is not None)]
    if not (rule.project and rule.project_over == "rows") and all(t.is_contiguous() for t in every):
        # One compiled form then serves tensors of all shapes.
        tensors = [t.view(-1) for t in tensors]
        delta = delta and Delta(delta.kept.view(-1), None if delta.full is None else delta.full.view(-1))
        anchor = anchor and Anchor(anchor.weights.view(-1), anchor.decay)
        master = None if master is None else master.view(-1)
    terms: Terms | None = _compiled()(
        *tensors, delta, s, rule, key, anchor=anchor, master=master, keep_terms=keep_terms
    )
    return terms


@cache
def _compiled() -> Callable[..., Any]:
    logger.warning("compiling the optimizer step for the CPU: the first step takes some seconds")
    return torch.compile(eager_merging_adamw_, dynamic=True)
