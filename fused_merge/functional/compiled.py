"""Eager code through `torch.compile`, the same bits, fused for the CPU.

Inductor neither contracts nor reorders floating-point arithmetic on a CPU, so that what it makes of
`fused_merge.eager` is equal to it bit for bit.
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
from fused_merge.eager.shard import ShardIndex

logger = logging.getLogger("fused_merge")


def merging_adamw_(*arguments: Any, anchor: Anchor | None, master: Tensor | None, **options: Any) -> Terms | None:
    """Do what `fused_merge.eager.merging_adamw.merging_adamw_` does, compiled when it is first needed."""
    *tensors, delta, s, rule, key = arguments
    numel = tensors[0].numel()
    if numel < 2 or tensors[0].dtype == torch.float64:
        # Sizes 0 and 1 would be compiled for themselves. And torch's own fp64 square root may be a unit in the last
        # place off where Inductor's is not: fp64 is defined by the eager code.
        return eager_merging_adamw_(*arguments, anchor=anchor, master=master, **options)
    key = key._replace(shard=key.shard or ShardIndex.whole(numel))
    every = [t for t in (*tensors, *(delta or ()), anchor and anchor.weights, master) if t is not None]
    if not (rule.project and rule.project_over == "rows") and all(t.is_contiguous() for t in every):
        # One compiled form then serves tensors of all shapes.
        tensors = [None if t is None else t.view(-1) for t in tensors]
        delta = delta and Delta(delta.tau.view(-1), None if delta.tau_dense is None else delta.tau_dense.view(-1))
        anchor = anchor and anchor._replace(weights=anchor.weights.view(-1))
        master = None if master is None else master.view(-1)
    step: Callable[..., Terms | None] = _compiled_step()
    return step(*tensors, delta, s, rule, key, anchor=anchor, master=master, **options)


@cache
def _compiled_step() -> Callable[..., Any]:
    logger.warning("compiling the optimizer step for the CPU: the first step takes some seconds")
    return torch.compile(eager_merging_adamw_, dynamic=True)
