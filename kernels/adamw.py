"""AdamW as an update that has not been applied yet; the equations of `fused_merge/eager/adamw.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from fused_merge.kernels import operands
from fused_merge.kernels.layout import SCALAR


@triton.jit
def moments(g, m, v, beta1, one_minus_beta1, beta2, one_minus_beta2):
    """`eager.adamw.moments`: m = b1*m + (1 - b1)*g and v = b2*v + (1 - b2)*g^2."""
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    return m, v


@triton.jit
def update(m, v, step_size, inv_sqrt_bias2, eps):
    """`eager.adamw.update`: u = -lr * (m / bc1) / (sqrt(v / bc2) + eps), in IEEE arithmetic."""
    # Triton's -x is 0 - x, which turns 0 into 0 and not into -0.
    return tl.div_rn(-1.0 * (step_size * m), tl.sqrt_rn(v) * inv_sqrt_bias2 + eps)


@triton.jit
def update_of(b, m, v):
    """u of a block's moments after this step."""
    step_size = tl.load(b.scalars_ptr + SCALAR.step_size)
    inv_sqrt_bias2 = tl.load(b.scalars_ptr + SCALAR.inv_sqrt_bias2)
    return update(m, v, step_size, inv_sqrt_bias2, tl.load(b.scalars_ptr + SCALAR.eps))


@triton.jit
def advance(b, g, SPEC: tl.constexpr):
    """The moments of a block after this step, and their u."""
    m, v = operands.load_moments(b, SPEC)
    m, v = moments(
        g,
        m,
        v,
        tl.load(b.scalars_ptr + SCALAR.beta1),
        tl.load(b.scalars_ptr + SCALAR.one_minus_beta1),
        tl.load(b.scalars_ptr + SCALAR.beta2),
        tl.load(b.scalars_ptr + SCALAR.one_minus_beta2),
    )
    return m, v, update_of(b, m, v)
