"""How this room is compiled: by numba, without the interpreter's lock, and once for all processes on a machine.

Loops over elements are compiled one by one, and called by their symbol: only so are they vector instructions whatever
calls them, and compiled once. They take addresses, counts and fp32 numbers, written `int` and `float`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from llvmlite import binding
from numba import cfunc, config, njit, types

logger = logging.getLogger("fused_merge")

_TYPES = {int: types.int64, float: types.float32, type(None): types.void}
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
    if not any(folder.iterdir()):
        logger.warning("compiling for the CPU: this takes some seconds, once on this machine")
    return str(folder) if os.access(folder, os.W_OK) else ""


@contextmanager
def _numba(**settings: Any) -> Iterator[None]:
    """Compile with other settings of numba."""
    before = {name: getattr(config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def _options(**own: bool) -> dict[str, Any]:
    """Return how numba is to compile: it behaves as IEEE 754 says, contracts nothing, and divides by zero."""
    return {"cache": bool(_cache_directory()), "error_model": "numpy", **own}


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function when another compiled one first calls it."""
    with _numba(CACHE_DIR=_cache_directory()):
        return njit(**_options(no_cpython_wrapper=True, no_cfunc_wrapper=True))(function)


def inlined(function: Callable[..., Any]) -> Any:
    """Compile a function into those that call it."""
    with _numba(CACHE_DIR=_cache_directory()):
        options = _options(forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
        return njit(**options)(function)


def loop(function: Callable[..., Any]) -> Any:
    """Compile a function of its own; other compiled functions call it by its symbol."""
    symbol = f"{function.__module__}.{function.__name__}".replace(".", "_")
    # Arrays in loops are views of addresses: nothing counts them.
    _loops[symbol] = compiled = _foreign(function, _nrt=False)
    binding.add_symbol(symbol, compiled.address)
    return types.ExternalFunction(symbol, compiled._sig)


def task(function: Callable[[int], None]) -> Callable[[], int]:
    """Return what compiles a function that threads are told to run by its address, and returns that."""

    @cache
    def compiled() -> int:
        # What lies between loops is short: to make it faster takes longer than it runs.
        with _numba(OPT=1, LOOP_VECTORIZE=False, SLP_VECTORIZE=False):
            address: int = _foreign(function).address
        return address

    return compiled


def _foreign(function: Callable[..., Any], **own: bool) -> Any:
    """Compile a function that can be called by its address."""
    hints = get_type_hints(function)
    returned = _TYPES[hints.pop("return")]
    with _numba(CACHE_DIR=_cache_directory()):
        return cfunc(returned(*(_TYPES[hint] for hint in hints.values())), **_options(**own))(function)
