"""What "the same" means everywhere in these tests: every bit."""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape, one dtype and the same bits; -0 is not 0, and a NaN has bits too."""
    pattern = PATTERNS[a.element_size()]
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.cpu().view(pattern), b.cpu().view(pattern))
