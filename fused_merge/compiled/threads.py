"""Work on blocks of tensors, in the threads of torch.

Threads of our own would wait for those of torch, which look out for work for some milliseconds after each operation. So
the OpenMP library that torch has loaded is told to run compiled code; where there is none, as many threads do it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fused_merge.compiled.jit import inlined
from fused_merge.compiled.layout import columns
from fused_merge.compiled.memory import BLOCK, fetch_add, int64
from fused_merge.compiled.scratch import SCRATCH, scratch

# Elements from which on another thread is worth waking.
_WORTH = 1 << 15


@dataclass(frozen=True)
class Blocks:
    """Some tensors, and where their blocks begin in the order of a pass."""

    numbers: np.ndarray  # int64: rows of the tables
    firsts: np.ndarray  # int64: where the blocks of each tensor begin, and the total
    elements: int

    @classmethod
    def of(cls, numbers: Sequence[int], numels: Sequence[int], counts: Sequence[int] | None = None) -> Blocks:
        """Return the blocks of the tensors of these numbers, of so many elements each, or of `counts` blocks."""
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


class Task(NamedTuple):
    """What the threads of a pass are told: 64-bit integers, most of them addresses."""

    next: int = 0  # the first block that no thread has taken yet
    thread: int = 0  # the number of the next thread
    blocks: int = 0  # how many blocks there are
    chunk: int = 0  # how many a thread takes at once
    scratch: int = 0  # the room of thread 0
    numbers: int = 0  # int64 [N]: rows of the tables
    firsts: int = 0  # int64 [N + 1]: where the blocks of each tensor begin
    tensors: int = 0  # T, rows of the tables
    table: int = 0  # int64 [T, ...]: `TensorEntry`
    scalars: int = 0  # fp32 [T, ...]: `Scalars`
    kths: int = 0  # int32 [T]: patterns of the thresholds of a ranked F
    products: int = 0  # fp32: inner products of blocks
    counts: int = 0  # int64: what each thread counts
    hows: int = 0  # int64 [T]: how u is found
    lows: int = 0  # int32 [T]: the window of patterns from here
    lasts: int = 0  # int32 [T]: to here
    ranks: int = 0  # int64 [T]
    bins: int = 0  # int64 [N]: where the bins that are counted begin
    shift: int = 0  # 2^shift patterns are one bin
    first: int = 0  # the first row of counts
    values: int = 0  # `thresholds.List`
    places: int = 0
    parts: int = 0
    own_firsts: int = 0
    room: int = 0  # how long the list can be
    listed: int = 0  # int64 [1]: up to where threads have taken pieces of it
    points: int = 0  # int64 [P, ...]: `interpolate.PointEntry`


TASK, TASKS = columns(Task), len(Task._fields)


@inlined
def begin(task):
    """Return the number of this thread, and its room."""
    thread = fetch_add(task + 8 * TASK.thread, 1)
    return thread, int64(task, TASKS)[TASK.scratch] + SCRATCH * thread


@inlined
def take(task):
    """Return which blocks to do next, from here to there; none if that is the same."""
    a = int64(task, TASKS)
    start = min(fetch_add(task + 8 * TASK.next, a[TASK.chunk]), a[TASK.blocks])
    return start, min(start + a[TASK.chunk], a[TASK.blocks])


@inlined
def locate(a, block, k):
    """Return which of the tensors a block is of, at or after the k-th, and the number of the block there."""
    firsts = a[TASK.firsts]
    while block >= int64(firsts + 8 * (k + 1), 1)[0]:
        k += 1
    return k, block - int64(firsts + 8 * k, 1)[0]


class Crew:
    """Threads with a room for each of them."""

    def __init__(self) -> None:
        self._rooms = scratch(0)

    def over(self, blocks: Blocks, work: Callable[[], int], **arguments: Any) -> None:
        """Run a task over blocks; arguments are fields of `Task`, arrays by their addresses."""
        if blocks.count == 0:
            return
        threads = min(blocks.threads, blocks.count)
        if len(self._rooms) < threads:
            self._rooms = scratch(threads)
        told = {name: x.ctypes.data if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
        task = Task(
            blocks=blocks.count,
            chunk=min(32, max(1, blocks.count // (8 * threads))),
            scratch=self._rooms.ctypes.data,
            numbers=blocks.numbers.ctypes.data,
            firsts=blocks.firsts.ctypes.data,
            **told,
        )
        in_threads(threads, work(), np.array(task, np.int64))

    def all(self, work: Callable[[], int], **arguments: Any) -> None:
        """Run a task in this thread, that goes over all rows of the tables."""
        told = {name: x.ctypes.data if isinstance(x, np.ndarray) else x for name, x in arguments.items()}
        in_threads(1, work(), np.array(Task(**told), np.int64))


def in_threads(threads: int, address: int, task: np.ndarray) -> None:
    """Call a function of this address with the address of a task in so many threads."""
    if threads == 1:
        _FUNCTION(address)(task.ctypes.data)
    elif (run := _openmp()) is not None:
        run(address, task.ctypes.data, threads, 0)
    else:
        others = [_pool(os.getpid()).submit(_FUNCTION(address), task.ctypes.data) for _ in range(1, threads)]
        _FUNCTION(address)(task.ctypes.data)
        for other in others:
            other.result()


# Foreign functions run without the interpreter's lock.
_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_int64)


@cache
def _openmp() -> Any:
    """Return what runs a function in the OpenMP threads of torch, or None."""
    libraries = Path(torch.__file__).parent / "lib"
    try:
        run = ctypes.CDLL(str(libraries / "libtorch_cpu.so")).GOMP_parallel
    except (OSError, AttributeError):
        return None
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return run


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of a process: they do not survive a fork."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="fused_merge")
