"""AdamW as an update that has not been applied yet, so that it can be merged first.

Source: Loshchilov & Hutter 2019 (arXiv 1711.05101), algorithm 2, in the convention of `torch.optim.AdamW`.
"""

from __future__ import annotations

from torch import Tensor

from fused_merge.eager.precision import sqrt_rn
from fused_merge.eager.scalars import Scalars


def moments(g: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: Scalars) -> tuple[Tensor, Tensor]:
    """Return m = b1*m + (1 - b1)*g and v = b2*v + (1 - b2)*g^2 (algorithm 2)."""
    m = s.beta1 * exp_avg + s.one_minus_beta1 * g
    v = s.beta2 * exp_avg_sq + s.one_minus_beta2 * (g * g)
    return m, v


def update(m: Tensor, v: Tensor, s: Scalars) -> Tensor:
    """Return u = -lr * (m / bc1) / (sqrt(v / bc2) + eps) (algorithm 2)."""
    return -(s.step_size * m) / (sqrt_rn(v) * s.inv_sqrt_bias2 + s.eps)
