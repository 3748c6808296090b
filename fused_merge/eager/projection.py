"""Projection of a gradient or an update onto the SFT delta, or out of conflict with it.

The projection of gradients on one another is PCGrad's (Yu et al. 2020, arXiv 2001.06782, algorithm 1); onto the
reference delta it is this library's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fused_merge.eager.sums import inner_product

# What is left of x - c*tau below this share of its terms is rounding, which Adam would blow up to a full step.
RESIDUE = 2.0**-20


def products(x: Tensor, tau: Tensor, *, rows: bool) -> Tensor:
    """Return <x, tau> and <tau, tau>, `[2]`; with `rows` one for each index along dim 0, `[2, rows, 1, ...]`."""
    return torch.stack((inner_product(x, tau, rows=rows), inner_product(tau, tau, rows=rows)))


def project(
    x: Tensor,
    tau: Tensor,
    how: str,
    *,
    strength: float,
    rows: bool,
    ascent: bool,
    along: Tensor | None = None,
) -> Tensor:
    """Project x with c = <x, tau> / <tau, tau>, over the whole tensor or over each row; no change where tau is 0.

    Args:
        x: a gradient or an update, fp32 or fp64, any shape.
        tau: the full reference delta (not sparsified), of the same shape and dtype.
        how: `"conflict"` removes the component c*tau where the step goes against tau; `"onto"` returns
            (1 - s)*x + s*c*tau.
        strength: s of `"onto"`.
        rows: one coefficient for each index along dim 0; tensors of fewer than two dimensions are one row.
        ascent: x points uphill, as a gradient does: the step goes along -x.
        along: `products` of the logical tensor, where x and tau are a shard of it.
    """
    dot, norm = products(x, tau, rows=rows) if along is None else along
    direction = norm > 0
    component = torch.where(direction, dot / torch.where(direction, norm, 1.0), 0.0) * tau
    if how == "onto":
        return torch.where(direction, (1.0 - strength) * x + strength * component, x)
    rest = x - component
    rest = torch.where(rest.abs() < RESIDUE * (x.abs() + component.abs()), 0.0, rest)
    against = (dot > 0) if ascent else (dot < 0)
    return torch.where(direction & against, rest, x)
