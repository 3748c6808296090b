"""theta(r) = theta0 + r * (theta1 - theta0), accurate at both ends.

Source: Lin et al. 2024 (arXiv 2309.06256), model averaging; r > 1 extrapolates as in Zheng et al. 2024
(ExPO, arXiv 2404.16792).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def interpolate(base: Tensor, tuned: Tensor, ratio: float) -> Tensor:
    """Return one point of the line through `base` (r = 0) and `tuned` (r = 1).

    Computed in fp32 (fp64 for fp64 tensors) from the nearer end and rounded once; r = 0 and r = 1 copy bits.

    Args:
        base: theta0, floating, any shape.
        tuned: theta1, of the same shape and dtype.
        ratio: r, finite; r and 1 - r are each rounded once to the dtype of the computation.
    """
    if ratio == 0.0:
        return base.clone()
    if ratio == 1.0:
        return tuned.clone()
    double = base.dtype == torch.float64
    a, b = (base, tuned) if double else (base.float(), tuned.float())
    near, far = (ratio, 1.0 - ratio) if double else (float(np.float32(ratio)), float(np.float32(1.0 - ratio)))
    difference = b - a
    merged = a + near * difference if ratio < 0.5 else b - far * difference
    return merged.to(base.dtype)
