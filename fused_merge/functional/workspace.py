"""What repeated calls on the same tensors share."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

Kept = TypeVar("Kept")


class Workspace:
    """What repeated calls on the same tensors can keep; it is never part of the result.

    On a GPU these are the tables that describe the tensors, made again when an address changes, and the last
    thresholds of F by magnitude, which save passes over the moments. A captured CUDA graph uses them: keep it as
    long as the graph.

    Example:
        >>> import torch
        >>> from fused_merge.functional import Workspace, inner_products
        >>> workspace, grads = Workspace(), [torch.ones(3), torch.full((2,), 2.0)]
        >>> for _ in range(2):
        ...     squares = inner_products(grads, workspace=workspace)
        >>> squares
        [tensor(3.), tensor(8.)]
    """

    def __init__(self) -> None:
        self._kept: dict[Hashable, Any] = {}

    def part(self, key: Hashable) -> Workspace:
        """Return what calls with this one of the tensors share."""
        return self.keep(("part", key), Workspace)

    def keep(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return what was made for `key`, or make it now."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: Kept = self._kept[key]
        return kept
