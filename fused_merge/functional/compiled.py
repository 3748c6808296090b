"""Eager code through `torch.compile`, the step and interpolation: the same bits, fused for the CPU.

Inductor neither contracts nor reorders floating-point arithmetic on a CPU, so that what it makes of
`fused_merge.eager` is equal to it bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_merge.eager.interpolate import between, nearer_end
from fused_merge.eager.interpolate import interpolate_ as eager_interpolate_
from fused_merge.eager.merging_adamw import Anchor, Delta, Terms
from fused_merge.eager.merging_adamw import merging_adamw_ as eager_merging_adamw_
from fused_merge.eager.precision import compute_dtype
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


def interpolate_(base: Tensor, tuned: Tensor, ratios: Sequence[float], outs: Sequence[Tensor]) -> None:
    """Do what `fused_merge.eager.interpolate.interpolate_` does, compiled when it is first needed.

    Each point reads both ends and writes itself, 3·b bytes per element of b bytes.
    """
    wide = compute_dtype(base.dtype, tuned.dtype)
    for ratio, out in zip(ratios, outs, strict=True):
        if ratio in (0.0, 1.0) or base.numel() < 2 or out.data_ptr() in (base.data_ptr(), tuned.data_ptr()):
            # Sizes 0 and 1, and an output that is an input, would be compiled for themselves.
            eager_interpolate_(base, tuned, [ratio], [out])
            continue
        weight, from_base = nearer_end(ratio, wide)
        _compiled_point()(base, tuned, torch.tensor(weight, dtype=wide), out, from_base=from_base)


def write_point(base: Tensor, tuned: Tensor, weight: Tensor, out: Tensor, *, from_base: bool) -> None:
    """Write one point; `weight` is a tensor, since numbers would be compiled into the code."""
    out.copy_(between(base.to(weight.dtype), tuned.to(weight.dtype), weight, from_base=from_base))


@cache
def _compiled_step() -> Callable[..., Any]:
    logger.warning("compiling the optimizer step for the CPU: the first step takes some seconds")
    return torch.compile(eager_merging_adamw_, dynamic=True)


@cache
def _compiled_point() -> Callable[..., Any]:
    logger.warning("compiling interpolation for the CPU: the first points take some seconds")
    return torch.compile(write_point, dynamic=True)
