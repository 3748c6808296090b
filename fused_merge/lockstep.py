"""Work that needs sums over process groups, done side by side so that collectives are few.

Such work is a generator: it yields local sums and goes on when they have become those of the logical tensors. What
all generators yield in one round is added up in one collective for each process group and dtype. The processes of a
group must yield the same sums in the same order; values may differ, sizes may not.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from fused_merge.distributed import sum_over
from fused_merge.eager.kth_largest import bin_counts, narrow, shifts
from fused_merge.eager.sparsify import pattern

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


def kth_largest(local: Callable[[], Tensor], k: int, groups: tuple[ProcessGroup, ...]) -> Steps[Tensor]:
    """Find the pattern of the k-th largest magnitude of a tensor whose elements several processes hold; 0-d.

    Args:
        local: returns the elements that this process holds, fp32 or fp64. It is called once a round, so that what it
            computes need not be kept.
        k: the rank, from 1.
        groups: of the processes.
    """
    patterns = pattern(local())
    dtype, device = patterns.dtype, patterns.device
    low, rank = (torch.tensor(x, device=device) for x in (0, k))
    for number, shift in enumerate(shifts(dtype)):
        if number:
            patterns = pattern(local())
        counts = bin_counts(patterns, low, shift)
        del patterns
        yield [LocalSum(counts, groups)]
        low, rank = narrow(counts, low, rank, shift)
    return low.to(dtype)
