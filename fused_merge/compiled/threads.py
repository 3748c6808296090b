"""Work on blocks, in as many threads as torch uses; compiled code runs without the interpreter's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch

from fused_merge.compiled.layout import Scratch, scratch
from fused_merge.compiled.memory import BLOCK

# Elements from which on another thread is worth waking.
_WORTH = 1 << 15


class Blocks(NamedTuple):
    """Some tensors, and where their blocks begin in the order of a pass."""

    numbers: np.ndarray  # int64: rows of the tables
    firsts: np.ndarray  # int64: where the blocks of each tensor begin, and the total
    elements: int

    @classmethod
    def of(cls, numbers: Sequence[int], numels: Sequence[int], counts: Sequence[int] | None = None) -> Blocks:
        """Return the blocks of the tensors of these numbers, of which all have `numels`; `counts` of blocks, if given."""
        counts = [-(-numel // BLOCK) for numel in numels] if counts is None else counts
        firsts = list(accumulate((counts[i] for i in numbers), initial=0))
        return cls(np.array(numbers, np.int64), np.array(firsts, np.int64), sum(numels[i] for i in numbers))

    @property
    def count(self) -> int:
        """How many blocks there are in all."""
        return int(self.firsts[-1])

    @property
    def threads(self) -> int:
        """In how many threads to work on them."""
        return max(1, min(torch.get_num_threads(), self.elements // _WORTH))


class Crew:
    """Threads with a room for each of them."""

    def __init__(self) -> None:
        self._rooms: list[Scratch] = []

    def over(self, blocks: Blocks, work: Callable[[int, int, int, Scratch], None]) -> None:
        """Call `work(thread, start, stop, scratch)` for a range of blocks in each thread."""
        self._rooms += [scratch() for _ in range(len(self._rooms), blocks.threads)]
        in_ranges(blocks.count, blocks.threads, lambda thread, *bounds: work(thread, *bounds, self._rooms[thread]))


def in_ranges(count: int, threads: int, work: Callable[[int, int, int], None]) -> None:
    """Call `work(thread, start, stop)` for equal ranges of `count` in so many threads, of which this is the first."""
    bounds = [count * i // threads for i in range(threads + 1)]
    others = [_pool(os.getpid()).submit(work, i, bounds[i], bounds[i + 1]) for i in range(1, threads)]
    work(0, bounds[0], bounds[1])
    for other in others:
        other.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process: they do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fused_merge")
