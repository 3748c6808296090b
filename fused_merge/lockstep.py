"""Work that needs sums over process groups, done side by side so that collectives are few.

Such work is a generator: it yields local sums and goes on when they have become those of the logical tensors. What
all generators yield in one round is added up in one collective for each process group and dtype. The processes of a
group must yield the same sums in the same order; values may differ, sizes may not.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fused_merge.distributed import sum_over

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class LocalSum(NamedTuple):
    """A tensor of local sums, which is mutated: it becomes the sum over the groups, one after the other."""

    tensor: Tensor
    groups: tuple[ProcessGroup, ...]


Steps: TypeAlias = "Generator[list[LocalSum], None, T]"


def side_by_side(steps: Sequence[Generator[list[Any], None, T]]) -> Generator[list[Any], None, list[T]]:
    """Advance generators round by round, as one that yields what all of them yield; return what they return."""
    results: dict[int, T] = {}
    while len(results) < len(steps):
        asked: list[Any] = []
        for number, step in enumerate(steps):
            if number in results:
                continue
            try:
                asked += next(step)
            except StopIteration as end:
                results[number] = end.value
        if len(results) < len(steps):
            yield asked
    return [results[number] for number in range(len(steps))]


def finish(step: Steps[T]) -> T:
    """Run a generator to its end, adding up what it yields."""
    while True:
        try:
            add_up(next(step))
        except StopIteration as end:
            result: T = end.value
            return result


def add_up(sums: Sequence[LocalSum]) -> None:
    """Make local sums those of the logical tensors: one collective for each process group and dtype."""
    for group in dict.fromkeys(group for each in sums for group in each.groups):
        tensors = [each.tensor for each in sums if group in each.groups]
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            own = [tensor for tensor in tensors if tensor.dtype == dtype]
            total = sum_over(torch.cat([tensor.reshape(-1) for tensor in own]), (group,))
            parts = torch.split(total, [tensor.numel() for tensor in own])
            torch._foreach_copy_(own, [part.view(tensor.shape) for part, tensor in zip(parts, own, strict=True)])
