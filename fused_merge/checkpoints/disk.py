"""Files written past the page cache where the file system takes that, and memory that they are written from."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_merge.checkpoints.plan import ALIGNMENT
from fused_merge.io.writer import writing

_DIRECT = getattr(os, "O_DIRECT", 0)
# Eleven files written from pages of this size took 3.0 s, from those of 4 KiB 3.8
# (`python bench/bench_checkpoints.py --size 0.5 --work DIR --settings`).
_HUGE_PAGE = 1 << 21


@dataclass
class DirectFile:
    """A file on its way, open in a block and written at any place by any thread, past the page cache if possible."""

    path: Path  # what it will be called; messages name it
    part: Path  # what it is called until then: replaced

    def __enter__(self) -> DirectFile:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._direct = bool(_DIRECT)
        with writing(self.path):
            try:
                self._handle = os.open(self.part, flags | _DIRECT, 0o666)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
                self._handle = os.open(self.part, flags, 0o666)
        return self

    def __exit__(self, *_: object) -> None:
        # A thread that is still on its way must not write to what gets this number next.
        handle, self._handle = self._handle, -1
        os.close(handle)

    def write(self, block: memoryview, at: int, nbytes: int) -> None:
        """Write the first bytes of a block, and, since a disk takes only whole sectors, what follows them there."""
        left = block[: -(-nbytes // ALIGNMENT) * ALIGNMENT]
        with writing(self.path):
            while left:
                direct = self._direct
                try:
                    written = os.pwrite(self._handle, left, at)
                except OSError as error:
                    # Another thread may have turned to the page cache since.
                    if error.errno != errno.EINVAL or not direct:
                        raise
                    flags = fcntl.fcntl(self._handle, fcntl.F_GETFL)
                    fcntl.fcntl(self._handle, fcntl.F_SETFL, flags & ~_DIRECT)
                    self._direct = False
                    continue
                left, at = left[written:], at + written

    def finish(self, size: int) -> None:
        """Cut the file to its size and wait until it is on the disk."""
        with writing(self.path):
            os.ftruncate(self._handle, size)
            os.fsync(self._handle)


def aligned(nbytes: int, *, pinned: bool) -> Tensor:
    """Return bytes that begin where a disk can write from, and that the system gets back as soon as they are free."""
    if pinned:
        room = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, pin_memory=True)
        return room[-room.data_ptr() % ALIGNMENT :][:nbytes]
    pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room = torch.frombuffer(pages, dtype=torch.uint8)
    first = -room.data_ptr() % _HUGE_PAGE
    # Not every system has them.
    with suppress(AttributeError, OSError):
        pages.madvise(mmap.MADV_HUGEPAGE, first, nbytes // _HUGE_PAGE * _HUGE_PAGE)
    return room[first:][:nbytes]
