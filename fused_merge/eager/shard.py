"""Where the elements of a local tensor lie in the logical, unsharded one."""

from __future__ import annotations

from typing import NamedTuple


class ShardIndex(NamedTuple):
    """The map from a local row-major element index to the global one.

    Local element `i` is global element `offset + (i // local_inner) * global_inner + i % local_inner`: runs of
    neighbors. A whole tensor or a shard of rows is a single run; a shard of columns has one run a row.
    """

    offset: int  # global index of local element 0
    local_inner: int  # elements in a run, at least 1
    global_inner: int  # global distance between the starts of neighboring runs

    @classmethod
    def whole(cls, numel: int) -> ShardIndex:
        """Return the index of a tensor of `numel` elements that is not sharded."""
        return cls(0, max(numel, 1), max(numel, 1))
