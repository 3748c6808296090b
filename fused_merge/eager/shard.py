"""Where the elements of a local tensor lie in the logical, unsharded one, and who holds the others."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardIndex(NamedTuple):
    """The map from a local row-major element index to the global one.

    Local element `i` is global element `offset + (i // local_inner) * global_inner + i % local_inner`: runs of
    neighbors. A whole tensor or a shard of rows is a single run; a shard of columns has one run a row.

    Attributes:
        offset: global index of local element 0.
        local_inner: elements in a run, at least 1.
        global_inner: global distance between the starts of neighboring runs.

    Example:
        >>> import torch
        >>> from fused_merge.functional import ShardIndex
        >>> offset, run, distance = ShardIndex(2, 2, 4)  # the last two columns of a tensor [3, 4]
        >>> [offset + i // run * distance + i % run for i in range(6)]
        [2, 3, 6, 7, 10, 11]
        >>> torch.arange(12).view(3, 4)[:, 2:].flatten().tolist()
        [2, 3, 6, 7, 10, 11]
    """

    offset: int
    local_inner: int
    global_inner: int

    @classmethod
    def whole(cls, numel: int) -> ShardIndex:
        """Return the index of a tensor of `numel` elements that is not sharded."""
        return cls(0, max(numel, 1), max(numel, 1))

    def after(self, count: int) -> ShardIndex:
        """Return the map of what follows the first `count` local elements, which are all of a run or end one."""
        runs, rest = divmod(count, self.local_inner)
        return self._replace(offset=self.offset + runs * self.global_inner + rest)


class Shard(NamedTuple):
    """What a process holds of a logical tensor, and the processes that hold the rest of it.

    Sums over the logical tensor are sums of local elements, added up over `groups` one after the other; sums over one
    index along its dim 0 are added up over `row_groups`.

    Attributes:
        elements: which elements of the logical tensor the local ones are.
        shape: of the logical tensor.
        groups: the process groups that hold it together; none if this process has all of it.
        row_groups: those that hold one index along dim 0 together.
        cuts_rows: whether the first or the last index along dim 0 may be held in part.

    Example:
        >>> import torch
        >>> from fused_merge.functional import Shard, ShardIndex, sparsify
        >>> tau, how = torch.ones(4, 8), {"name": "w", "method": "random", "reserve_rate": 0.5, "seed": 0}
        >>> last_rows = Shard(ShardIndex(16, 16, 16), (4, 8))
        >>> part = sparsify(tau[2:], shard=last_rows, **how)  # the mask of a part is that of the whole
        >>> torch.equal(part.unpack(), sparsify(tau, **how).unpack()[2:])
        True
    """

    elements: ShardIndex
    shape: Sequence[int]
    groups: tuple[ProcessGroup, ...] = ()
    row_groups: tuple[ProcessGroup, ...] = ()
    cuts_rows: bool = False

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Shard:
        """Return the shard that is all of a tensor."""
        return cls(ShardIndex.whole(prod(shape)), shape)

    def summed_over(self, extent: str) -> tuple[ProcessGroup, ...]:
        """Return the groups over which sums over the `"tensor"`, or its `"rows"`, are added up."""
        return self.row_groups if extent == "rows" and self.has_rows else self.groups

    @property
    def numel(self) -> int:
        """Elements of the logical tensor."""
        return prod(self.shape)

    @property
    def has_rows(self) -> bool:
        """Whether the logical tensor has several rows; one of fewer than two dimensions is one row."""
        return len(self.shape) > 1 and self.shape[0] > 1
