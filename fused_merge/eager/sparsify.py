"""F: what of an update, or of the reference delta, takes part in a merge.

Each function takes x (fp32 or fp64, any shape), the share p of elements to keep, in (0, 1], and the key of the
tensor's random numbers, and returns F(x) with zeros where nothing is kept.

Source: Lu et al. 2024 (arXiv 2405.17931): random drop (OnDARE, after DARE, arXiv 2311.03099) and top-p by
magnitude (OnTIES, after TIES-Merging, arXiv 2306.01708).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fused_merge.eager.philox import DOMAIN_TAU, MaskKey, keep_mask
from fused_merge.eager.shard import ShardIndex
from fused_merge.names import tensor_id

_PATTERN = {torch.float64: torch.int64, torch.float32: torch.int32}
# The pattern above that of infinity. Which one a NaN has depends on how it was computed.
NAN_PATTERN = {torch.float64: 0x7FF0000000000001, torch.float32: 0x7F800001}


def none(x: Tensor, rate: float, key: MaskKey) -> Tensor:
    """Return x."""
    return x


def random(x: Tensor, rate: float, key: MaskKey) -> Tensor:
    """Keep each element with probability p, as its Philox word says; nothing is rescaled here."""
    if rate == 1.0:
        return x
    return torch.where(keep_mask(x.numel(), rate, key, device=x.device).view(x.shape), x, 0.0)


def magnitude(x: Tensor, rate: float, key: MaskKey) -> Tensor:
    """Keep where |x| is at least the k-th largest |x| of the tensor, k = max(1, floor(p*n)).

    All ties at the threshold stay, so that the choice does not depend on any order. NaN counts as above infinity.
    """
    if rate == 1.0 or x.numel() == 0:
        return x
    return keep_from(x, kth_largest(x, rate))


def soft_threshold(x: Tensor, rate: float, key: MaskKey) -> Tensor:
    """Shrink every |x| by the k-th largest |x|, k = max(1, floor(p*n)), and drop what would change its sign.

    Source: Donoho 1995, "De-noising by soft-thresholding", with the threshold at a quantile; as a merge it is the
    nearswap of model-merging tools. NaN stays NaN.
    """
    if rate == 1.0 or x.numel() == 0:
        return x
    return shrink_by(x, kth_largest(x, rate))


def keep_from(x: Tensor, kth: Tensor) -> Tensor:
    """Keep what is at least as large as the threshold, a 0-d pattern."""
    return torch.where(pattern(x) >= kth, x, 0.0)


def shrink_by(x: Tensor, kth: Tensor) -> Tensor:
    """Shrink every magnitude by the threshold, a 0-d pattern."""
    threshold = kth.view(x.dtype)
    # An infinite or NaN threshold would turn all that is finite into NaN.
    shrunk = torch.where(x.abs() > threshold, x - threshold.copysign(x), 0.0)
    return torch.where(x.isnan(), x, shrunk)


SPARSIFY: dict[str, Callable[[Tensor, float, MaskKey], Tensor]] = {
    "none": none,
    "random": random,
    "magnitude": magnitude,
    "soft_threshold": soft_threshold,
}
# Those that compare with the k-th largest magnitude of the tensor, given it.
RANKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"magnitude": keep_from, "soft_threshold": shrink_by}


def kept_count(numel: int, rate: float) -> int:
    """Return k = max(1, floor(rate * numel)): the paper's top-p never empties a small tensor."""
    return max(1, math.floor(rate * numel))


def sparsify_tau(
    tau: Tensor,
    *,
    name: str,
    method: str,
    reserve_rate: float,
    seed: int,
    elements: ShardIndex | None = None,
    kth: Tensor | None = None,
) -> Tensor:
    """Return F(tau), once and for the whole run, unscaled and in the dtype of tau.

    Args:
        tau: the delta of one tensor, any floating dtype, any shape.
        name: the tensor's name; its canonical form keys the random mask.
        method: a key of `SPARSIFY`.
        reserve_rate: share to keep, in (0, 1].
        seed: of the random mask, which is drawn in a domain of its own, at step 0.
        elements: where the elements of a part of a tensor lie in it; None for a whole one.
        kth: the threshold of the whole tensor for the methods in `RANKED`, a 0-d pattern; None finds that of `tau`.

    Raises:
        ValueError: if there is no such method.
    """
    if method not in SPARSIFY:
        raise ValueError(
            f"unknown way to sparsify a reference delta: {method!r}; use one of {', '.join(map(repr, SPARSIFY))}"
        )
    wide = widened(tau)
    if kth is not None:
        return RANKED[method](wide, kth).to(tau.dtype)
    key = MaskKey(seed=seed, step=0, tensor_id=tensor_id(name), domain=DOMAIN_TAU, shard=elements)
    return SPARSIFY[method](wide, reserve_rate, key).to(tau.dtype)


def widened(x: Tensor) -> Tensor:
    """Return x in the precision in which F compares: fp64 as it is, anything else in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def pattern(x: Tensor) -> Tensor:
    """Return the bits of |x| as integers of its width, ordered as the magnitudes are; every NaN is NAN_PATTERN."""
    return x.abs().view(_PATTERN[x.dtype]).clamp_(max=NAN_PATTERN[x.dtype])


def kth_largest(x: Tensor, rate: float) -> Tensor:
    """Return the pattern of the k-th largest |x| of a tensor with elements, k = max(1, floor(p*n)), 0-d."""
    k = kept_count(x.numel(), rate)
    return pattern(x).flatten().kthvalue(x.numel() - k + 1).values
