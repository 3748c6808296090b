"""Files as users name them: their paths, whether they changed, and what the operating system refuses, in a sentence."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

# The size of a file and when it was changed, in ns.
Stamp: TypeAlias = tuple[int, int]


def expanded(path: str | os.PathLike[str]) -> Path:
    """Return a path as a user gave it, with `~` expanded where the shell did not."""
    return Path(os.path.expanduser(path))


def stamp_of(path: Path) -> Stamp:
    """Return the size of a file and when it was changed."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def check_unchanged(stamps: Mapping[Path, Stamp]) -> None:
    """Raise OSError if a file is not what it was when its stamp was taken."""
    for path, stamp in stamps.items():
        with suppress(OSError):
            if stamp_of(path) == stamp:
                continue
        raise OSError(f"{path} vanished or changed after it was looked at; put it back and run the same again")


@contextmanager
def explained(what: str, way_out: str) -> Iterator[None]:
    """Say in one sentence what the operating system refuses: what could not be done, its reason, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{what}: {error.strerror or error}; {way_out}") from error


@contextmanager
def reading(path: Path) -> Iterator[int]:
    """Open a file to read from any place of it; what the operating system refuses becomes a sentence."""
    with explained(f"cannot read {path}", "put it back and run the same again"):
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)


def read_into(handle: int, path: Path, view: memoryview, at: int) -> None:
    """Fill a view from a place of a file; OSError if that cannot be read or ends early."""
    while view:
        with explained(f"cannot read {path}", "check its disk and run the same again"):
            got = os.preadv(handle, [view], at)
        if got == 0:
            raise OSError(f"{path} ends before byte {at + len(view)}: it changed while it was read; run the same again")
        view, at = view[got:], at + got


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as bytes."""
    return tensor.view(torch.uint8).numpy().data
