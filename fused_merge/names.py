"""Canonical names of tensors, and what follows from a name: the key of random masks, the layer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})


@cache
def canonical_name(name: str) -> str:
    """Return `name` without what DDP, torch.compile, FSDP and checkpointing insert: `module._orig_mod.w` becomes `w`.

    The last component is the tensor's own name and always stays.
    """
    *path, last = name.split(".")
    return ".".join([part for part in path if part not in _WRAPPERS] + [last])


@cache
def tensor_id(name: str) -> int:
    """Return the number that keys the random masks of a tensor, so that they depend on nothing about the run.

    It is the first four bytes, little endian, of the SHA-256 of the canonical name.
    """
    return int.from_bytes(hashlib.sha256(canonical_name(name).encode()).digest()[:4], "little")


def layer_of(name: str) -> tuple[str, int] | None:
    """Return what comes before the first component of a name that is a number, and the number; None if there is none.

    `"model.layers.7.mlp.up.weight"` is in layer 7 of `"model.layers"`, and `"0.weight"` in layer 0 of `""`.
    """
    parts = name.split(".")
    return next(((".".join(parts[:i]), int(part)) for i, part in enumerate(parts) if part.isdecimal()), None)


def some(items: Iterable[str], shown: int = 3) -> str:
    """Return the first few items and how many more there are."""
    listed = list(items)
    more = f" and {len(listed) - shown} more" if len(listed) > shown else ""
    return ", ".join(listed[:shown]) + more


def describe(tensor: Tensor) -> str:
    """Return shape, dtype and device of a tensor, for error messages."""
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
