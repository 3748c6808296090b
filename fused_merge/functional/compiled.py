"""Interpolation through `torch.compile`: the same bits, fused for the CPU.

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
from fused_merge.eager.precision import compute_dtype

logger = logging.getLogger("fused_merge")


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
def _compiled_point() -> Callable[..., Any]:
    logger.warning("compiling interpolation for the CPU: the first points take some seconds")
    return torch.compile(write_point, dynamic=True)
