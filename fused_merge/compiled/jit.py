"""How this room is compiled: by numba, without the interpreter's lock, and once for all processes on a machine.

Loops over elements are compiled one by one, and called by their symbol: only so are they vector instructions whatever
calls them, and compiled once. They take addresses, counts and fp32 numbers, written `int` and `float`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from llvmlite import binding
from numba import cfunc, config, njit, types

_TYPES = {int: types.int64, float: types.float32, type(None): types.void}
# numba behaves as IEEE 754 says, and contracts nothing; division by zero is no exception.
_ARITHMETIC = "numpy"
_loops: dict[str, Any] = {}


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


@contextmanager
def _cached() -> Iterator[bool]:
    """Let functions be kept in that folder; whether there is one."""
    folder, before = _cache_directory(), config.CACHE_DIR
    config.CACHE_DIR = folder
    try:
        yield bool(folder)
    finally:
        config.CACHE_DIR = before


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called."""
    with _cached() as cached:
        return njit(cache=cached, nogil=True, error_model=_ARITHMETIC)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a function into those that call it."""
    with _cached() as cached:
        return njit(cache=cached, forceinline=True, error_model=_ARITHMETIC)(function)


def loop(function: Callable[..., Any]) -> Any:
    """Compile a function of its own; other compiled functions call it by its symbol."""
    compiled, signature = _foreign(function)
    symbol = f"{function.__module__}.{function.__name__}".replace(".", "_")
    _loops[symbol] = compiled
    binding.add_symbol(symbol, compiled.address)
    return types.ExternalFunction(symbol, signature)


def task(function: Callable[[int], None]) -> Callable[[], int]:
    """Return what compiles a function that threads are told to run by its address, and returns that."""
    return cache(lambda: _foreign(function)[0].address)


def _foreign(function: Callable[..., Any]) -> tuple[Any, Any]:
    """Compile a function that can be called by its address."""
    hints = get_type_hints(function)
    returned = _TYPES[hints.pop("return")]
    signature = returned(*(_TYPES[hint] for hint in hints.values()))
    with _cached() as cached:
        return cfunc(signature, cache=cached, error_model=_ARITHMETIC)(function), signature
