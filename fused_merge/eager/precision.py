"""The precision that everything is computed in, whatever it is stored in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(*stored: torch.dtype) -> torch.dtype:
    """Return the dtype in which tensors of these dtypes are computed: fp64 if any of them is fp64, else fp32."""
    return torch.float64 if torch.float64 in stored else torch.float32


def sqrt_rn(x: Tensor) -> Tensor:
    """Return the correctly rounded square root.

    `torch.sqrt` of fp32 on a CPU may be one unit in the last place off; through fp64 it is exact after the
    second rounding, since fp64 carries more than twice the digits of fp32.
    """
    return x.double().sqrt().to(x.dtype)
