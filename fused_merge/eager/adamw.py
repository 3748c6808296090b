"""AdamW as an update that has not been applied yet, so that it can be merged first.

Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, in the convention of `torch.optim.AdamW`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_merge.eager.scalars import Scalars


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """Return the dtype a step is computed in: fp64 for fp64 parameters, fp32 for every other."""
    return torch.float64 if storage == torch.float64 else torch.float32


def moments(g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """Return m = b1*m + (1 - b1)*g and v = b2*v + (1 - b2)*g^2 (algorithm 2)."""
    m = s.beta1 * exp_avg + s.one_minus_beta1 * g
    v = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (g * g)
    return m, v


def update(m: Tensor, v: Tensor, s: Scalars) -> Tensor:
    """Return u = -lr * (m / bc1) / (sqrt(v / bc2) + eps) (algorithm 2)."""
    return -(s.step_size * m) / (sqrt_rn(v) * s.inv_sqrt_bias2 + s.eps)


def sqrt_rn(x: Tensor) -> Tensor:
    """Return the correctly rounded square root.

    `torch.sqrt` of fp32 on a CPU may be one unit in the last place off; through fp64 it is exact after the
    second rounding, since fp64 carries more than twice the digits of fp32.
    """
    return x.double().sqrt().to(x.dtype)
