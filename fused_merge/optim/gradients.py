"""What gradients are multiplied by before a step: loss scale, clipping, sign."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_merge.functional.inner_products import inner_products
from fused_merge.functional.workspace import Workspace


def inverse_of(grad_scale: Tensor | None) -> float | Tensor:
    """Return 1 / grad_scale, 0-d fp64, as `torch.amp.GradScaler` handed it over; 1 without one."""
    return 1.0 if grad_scale is None else grad_scale.double().reciprocal().view(())


def grad_norm(grads: Sequence[Tensor], inverse_scale: float | Tensor, *, workspace: Workspace, impl: str) -> Tensor:
    """Return the norm of all unscaled gradients, 0-d fp64 on the device of the first; nothing waits for it.

    Gradients are unscaled first of all, since the squares of scaled ones may leave the range of fp32.
    """
    squares = inner_products(grads, scale=inverse_scale, workspace=workspace, impl=impl)
    return torch.stack([square.to(squares[0].device, torch.float64) for square in squares]).sum().sqrt()


def grad_factor(group: Mapping[str, Any], norm: Tensor | None, inverse_scale: float | Tensor) -> float | Tensor:
    """Return the one factor of a group's gradients: 1 / grad_scale, the clipping coefficient, -1 to maximize."""
    factor: float | Tensor = -inverse_scale if group["maximize"] else inverse_scale
    if group["max_grad_norm"] is not None and norm is not None:
        factor = factor * (group["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
    return factor
