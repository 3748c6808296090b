"""How this room is compiled: by numba, without the interpreter's lock, once for all processes on a machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import config, njit

Function = TypeVar("Function", bound=Callable[..., Any])


@cache
def _cache_directory() -> str:
    """Return where compiled code is kept: a folder for this very source, or nothing where none can be written.

    numba looks at the file of a function and not at those of the functions that it calls.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(config.CACHE_DIR or Path(home) / "fused_merge") / digest.hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ""
    return str(folder) if os.access(folder, os.W_OK) else ""


def jit(function: Function) -> Function:
    """Compile a function when it is first called; numbers behave as IEEE 754 says, and nothing is contracted."""
    return _compiled(function)


def inlined(function: Function) -> Function:
    """Compile a function into those that call it: loops around it then become vector instructions."""
    return _compiled(function, forceinline=True)


def _compiled(function: Function, **options: bool) -> Function:
    folder, before = _cache_directory(), config.CACHE_DIR
    config.CACHE_DIR = folder
    try:
        compiled: Function = njit(cache=bool(folder), nogil=True, error_model="numpy", **options)(function)
    finally:
        config.CACHE_DIR = before
    return compiled
