"""Triton's interpreter at a lower price.

For each call of a device function it replaces the builtins of the language by its own, and puts them back afterwards.
Within a launch they are replaced already, so that all calls but the outermost one need not do it again.
"""

from __future__ import annotations

import inspect
from functools import cache

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

_patch_lang = interpreter._patch_lang
# The modules whose builtins are replaced just now.
_patched: set[object] = set()


class _Outermost:
    def __init__(self, scope, modules) -> None:
        self._scope, self._modules = scope, modules

    def restore(self) -> None:
        self._scope.restore()
        _patched.difference_update(self._modules)


@cache
def _modules(fn):
    return {value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)}


def _patch_once(fn):
    modules = _modules(fn)
    if modules and modules <= _patched:
        return interpreter._LangPatchScope()
    new = modules - _patched
    _patched.update(new)
    return _Outermost(_patch_lang(fn), new)


def patch_once() -> None:
    """Let the interpreter replace the builtins of the language once per launch, and look up a dtype once."""
    interpreter._patch_lang = _patch_once
    known = cache(interpreter._get_np_dtype)
    # Types of pointers cannot be hashed.
    interpreter._get_np_dtype = lambda of: np.dtype(np.uint64) if of.scalar.is_ptr() else known(of.scalar)
