"""What "the same" means everywhere in these tests: every bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The patterns of numbers, as integers on the host."""
    return x.cpu().contiguous().view(PATTERNS[x.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits; -0 is not 0, and a NaN has bits too."""
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def assert_same_bits(a: Any, b: Any, what: str = "") -> None:
    """Fail where two tensors, or mappings or sequences of tensors, are not the same."""
    if isinstance(a, Tensor):
        assert same_bits(a, b), what
    elif isinstance(a, Mapping):
        assert a.keys() == b.keys(), what
        for key in a:
            assert_same_bits(a[key], b[key], f"{what} {key}")
    else:
        assert len(a) == len(b), what
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same_bits(*pair, f"{what} {i}")
