"""What gradients are multiplied by before a step: loss scale, clipping, sign."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_merge.distributed import is_sharded, local_part
from fused_merge.functional.inner_products import inner_products
from fused_merge.functional.workspace import Workspace
from fused_merge.lockstep import LocalSum, add_up

logger = logging.getLogger("fused_merge")


def warn_of_no_gradient() -> None:
    """Warn that a step found nothing to do, as none does that comes after."""
    logger.warning(
        "no parameter of this optimizer has a gradient, and the step changed nothing; if another model is trained than "
        "the one that the optimizer was made of, as when TRL wraps it for its peft_config, make the optimizer of the "
        "model that is trained, for example through fm.optimizer_factory"
    )


def inverse_of(grad_scale: Tensor | None) -> float | Tensor:
    """Return 1 / grad_scale, 0-d fp64, as `torch.amp.GradScaler` handed it over; 1 without one."""
    return 1.0 if grad_scale is None else grad_scale.double().reciprocal().view(())


def local_gradient(name: str, param: Tensor) -> Tensor:
    """Return what this process holds of the gradient of a parameter that has one.

    A gradient that is placed otherwise than its parameter, as a sum that is still to be taken, is redistributed.
    ValueError if it is sparse, or one of the two is sharded and the other is not.
    """
    grad = param.grad
    assert grad is not None
    if is_sharded(grad) != is_sharded(param):
        raise ValueError(f"parameter {name!r} or its gradient is sharded, and not both; shard both, or none")
    if is_sharded(grad) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    grad = local_part(grad)
    if grad.layout != torch.strided:
        raise ValueError(
            f"the gradient of {name!r} is sparse ({grad.layout}); use a dense one, as from nn.Embedding(sparse=False)"
        )
    return grad


def grad_norm(
    grads: Sequence[Tensor],
    groups: Sequence[tuple[Any, ...]],
    inverse_scale: float | Tensor,
    *,
    workspace: Workspace,
    impl: str,
) -> Tensor:
    """Return the norm of all unscaled gradients, 0-d fp64 on the device of the first; nothing waits for it.

    Gradients are unscaled first of all, since the squares of scaled ones may leave the range of fp32. `groups` hold
    what is missing of each of them.
    """
    squares = inner_products(grads, scale=inverse_scale, workspace=workspace, impl=impl)
    add_up([LocalSum(square, group) for square, group in zip(squares, groups, strict=True) if group])
    return torch.stack([square.to(squares[0].device, torch.float64) for square in squares]).sum().sqrt()


def grad_factor(group: Mapping[str, Any], norm: Tensor | None, inverse_scale: float | Tensor) -> float | Tensor:
    """Return the one factor of a group's gradients: 1 / grad_scale, the clipping coefficient, -1 to maximize."""
    factor: float | Tensor = -inverse_scale if group["maximize"] else inverse_scale
    if group["max_grad_norm"] is not None and norm is not None:
        factor = factor * (group["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
    return factor
