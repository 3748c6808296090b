"""F: which elements of an update, or of the reference delta, take part in a merge.

Source: Lu et al. 2024 (arXiv 2405.17931), section 3: random drop (OnDARE, after DARE, arXiv 2311.03099) and
top-p by magnitude (OnTIES, after TIES-Merging, arXiv 2306.01708).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_merge.eager.philox import DOMAIN_TAU, keep_mask
from fused_merge.names import tensor_id

_PATTERN = {torch.float64: torch.int64, torch.float32: torch.int32}


def kept_count(numel: int, rate: float) -> int:
    """Return k = max(1, floor(rate * numel)): the paper's top-p never empties a small tensor."""
    return max(1, math.floor(rate * numel))


def magnitude_mask(x: Tensor, rate: float) -> Tensor:
    """Return where |x| is at least the k-th largest |x| of the tensor, k = max(1, floor(rate * numel)).

    All ties at the threshold stay, so that the choice does not depend on any order. Magnitudes compare as the
    integer patterns of |x|, which order finite values as themselves and NaN above infinity.

    Args:
        x: fp32 or fp64 tensor of any shape.
        rate: share to keep, in (0, 1].

    Returns:
        Bool tensor of the shape of `x`.
    """
    if rate == 1.0 or x.numel() == 0:
        return torch.ones_like(x, dtype=torch.bool)
    pattern = x.abs().view(_PATTERN[x.dtype])
    k = kept_count(x.numel(), rate)
    kth_largest = pattern.flatten().kthvalue(x.numel() - k + 1).values
    return pattern >= kth_largest


def sparsify(x: Tensor, keep: Tensor) -> Tensor:
    """Return F(x): `x` where `keep`, zero elsewhere."""
    return torch.where(keep, x, torch.zeros_like(x))


def tau_mask(tau: Tensor, *, name: str, method: str, reserve_rate: float, seed: int) -> Tensor:
    """Return which elements of a reference delta are kept, once and for the whole run.

    Args:
        tau: the whole (unsharded) delta of one tensor, any floating dtype, any shape.
        name: the tensor's name; its canonical form keys the random mask.
        method: `"random"`, `"magnitude"` or `"none"` (all are kept).
        reserve_rate: share to keep, in (0, 1].
        seed: of the random mask; the mask of tau is drawn in a domain of its own.

    Returns:
        Bool tensor of the shape of `tau`.

    Raises:
        ValueError: if `method` is not one of the three.
    """
    if method == "none":
        return torch.ones_like(tau, dtype=torch.bool)
    if method == "random":
        return keep_mask(
            tau.numel(),
            reserve_rate,
            seed=seed,
            step=0,
            tensor_id=tensor_id(name),
            domain=DOMAIN_TAU,
            device=tau.device,
        ).view(tau.shape)
    if method == "magnitude":
        return magnitude_mask(tau if tau.dtype == torch.float64 else tau.float(), reserve_rate)
    raise ValueError(f"unknown way to sparsify a reference delta: {method!r}; use 'random', 'magnitude' or 'none'")
