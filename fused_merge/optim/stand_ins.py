"""Tensors that DeepSpeed puts in place of an optimizer's parameters, of which nobody has told yet what they are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class StandIns:
    """Knows the parameters that an optimizer was made with from what a framework may put in their place."""

    def __init__(self) -> None:
        self._shapes: set[torch.Size] = set()
        self._only_parameters = True

    def expect(self, params: Sequence[Tensor]) -> None:
        """Take note of what the optimizer is given."""
        self._shapes |= {param.shape for param in params}
        self._only_parameters &= all(isinstance(param, nn.Parameter) for param in params)

    def are_idle(self, params: Sequence[Tensor]) -> bool:
        """Return whether a step on these, of which nothing was told, is none; ValueError if it would be one.

        The optimizer that DeepSpeed uses for 16-bit weights without ZeRO takes a step with zero gradients when it is
        made, so that states exist. For a merging optimizer that would be one alpha*tau too many, for any Adam one
        count. Flat tensors are refused whatever their gradients are: not all processes would see the same ones.
        """
        if "deepspeed" not in sys.modules or not self._only_parameters:
            return False
        strange = [param for param in params if not isinstance(param, nn.Parameter)]
        if any(param.shape not in self._shapes or (param.grad is not None and param.grad.any()) for param in strange):
            raise ValueError(
                "DeepSpeed has put other tensors in place of the parameters; call fused_merge.bind_deepspeed(engine) "
                "after deepspeed.initialize and before the first step"
            )
        return bool(strange)
