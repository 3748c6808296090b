"""The product of the two factors of an adapter: delta W = scale * B A (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_delta(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale * left right, `[rows, columns]`, of `left` `[rows, r]` and `right` `[r, columns]`, r at least 1.

    Both are fp32 or both fp64, as the result. The terms are added one after the other in the order of the rank, each
    rounded, and the sum is scaled: a block of rows has the bits of the same rows of the whole.
    """
    total = left[:, :1] * right[:1]
    for k in range(1, right.shape[0]):
        total += left[:, k : k + 1] * right[k : k + 1]
    return total.mul_(torch.tensor(scale, dtype=total.dtype, device=total.device))
