"""AdamW as an update that has not been applied yet; the equations of `fused_merge/eager/adamw.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import operands
from fused_merge.kernels.layout import SCALAR


@triton.jit
def update(b, m, v):
    """`eager.adamw.update`: u = -lr * (m / bc1) / (sqrt(v / bc2) + eps), in IEEE arithmetic."""
    step_size = tl.load(b.scalars_ptr + SCALAR.step_size)
    inv_sqrt_bias2, eps = tl.load(b.scalars_ptr + SCALAR.inv_sqrt_bias2), tl.load(b.scalars_ptr + SCALAR.eps)
    # Triton's -x is 0 - x, which turns 0 into 0 and not into -0.
    return tl.div_rn(-1.0 * (step_size * m), tl.sqrt_rn(v) * inv_sqrt_bias2 + eps)


@triton.jit
def advance(b, g, SPEC: tl.constexpr):
    """`eager.adamw.moments`: m = b1*m + (1 - b1)*g and v = b2*v + (1 - b2)*g^2, and their u, or another optimizer's."""
    if SPEC.GRAD is None:
        _, u = operands.added_elsewhere(b, SPEC)
        return 0.0, 0.0, u
    else:
        m, v = operands.load_moments(b, SPEC)
        m = tl.load(b.scalars_ptr + SCALAR.beta1) * m + tl.load(b.scalars_ptr + SCALAR.one_minus_beta1) * g
        v = tl.load(b.scalars_ptr + SCALAR.beta2) * v + tl.load(b.scalars_ptr + SCALAR.one_minus_beta2) * (g * g)
        return m, v, update(b, m, v)
