"""theta(r) = theta0 + r * (theta1 - theta0), accurate at both ends.

Source: Lin et al. 2024 (arXiv 2309.06256), model averaging; r > 1 extrapolates as in Zheng et al. 2024
(ExPO, arXiv 2404.16792).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fused_merge.eager.precision import compute_dtype

# Bytes of temporaries a thread of torch: with fewer, blocks cost more in calls than they gain by the caches.
_SCRATCH = 5 << 19
# The temporaries of a block, rows of scratch: both ends, their difference, its product with a weight, and a point.
_BASE, _TUNED, _DELTA, _PRODUCT, _POINT = range(5)


def interpolate(base: Tensor, tuned: Tensor, ratio: float) -> Tensor:
    """Return one point of the path from `base` (r = 0) to `tuned` (r = 1), in the dtype of `base`.

    Computed in fp32 (fp64 if either end is) from the nearer end and rounded once; r = 0 and r = 1 copy bits.

    Args:
        base: theta0, floating, any shape.
        tuned: theta1, of the same shape.
        ratio: r, finite; r and 1 - r are each rounded once to the dtype of the computation.
    """
    if ratio == 0.0:
        return base.clone()
    if ratio == 1.0:
        return tuned.to(base.dtype, copy=True)
    wide = compute_dtype(base.dtype, tuned.dtype)
    weight, from_base = nearer_end(ratio, wide)
    return between(base.to(wide), tuned.to(wide), weight, from_base=from_base).to(base.dtype)


def between(a: Tensor, b: Tensor, weight: float | Tensor, *, from_base: bool) -> Tensor:
    """Return what lies between a = theta0 and b = theta1, `weight` of the way from one of them, not rounded."""
    return a + weight * (b - a) if from_base else b - weight * (b - a)


def interpolate_(
    base: Tensor, tuned: Tensor, ratios: Sequence[float], outs: Sequence[Tensor], scratch: Tensor | None = None
) -> None:
    """Write R points of the path: the bits of `interpolate`, from one read of the ends.

    Goes by blocks that stay in a cache: b - a is taken once, and its product with a weight once for the two points
    that lie as far from either end.

    Args:
        base: theta0, a vector.
        tuned: theta1, a vector of as many elements.
        ratios: R finite ratios.
        outs: R vectors of as many elements, of any floating dtype: mutated. One may be an input if R = 1.
        scratch: uint8, contiguous, of at least 64 bytes on the device of the ends: overwritten. The more bytes, the
            larger the blocks. None allocates.
    """
    wide = compute_dtype(base.dtype, tuned.dtype)
    copies: list[tuple[Tensor, Tensor]] = []
    # Of each weight the points that are so far from an end, and whether that end is base.
    points: dict[float, list[tuple[bool, Tensor]]] = {}
    for ratio, out in zip(ratios, outs, strict=True):
        if ratio in (0.0, 1.0):
            copies.append(((base, tuned)[int(ratio)], out))
        else:
            weight, from_base = nearer_end(ratio, wide)
            points.setdefault(weight, []).append((from_base, out))
    rows, delta_at, product_at, point_at = 5, _DELTA, _PRODUCT, _POINT
    if len(points) == 1 and len(same_weight := next(iter(points.values()))) == 1:
        # The end that a single point does not start from makes room for all that follows.
        rows = 2
        delta_at = product_at = point_at = _TUNED if same_weight[0][0] else _BASE
    if scratch is None:
        nbytes = rows * base.numel() * wide.itemsize
        if base.device.type == "cpu":
            nbytes = min(nbytes, torch.get_num_threads() * _SCRATCH)
        scratch = torch.empty(nbytes, dtype=torch.uint8, device=base.device)
    block = max(1, min(base.numel(), scratch.numel() // (rows * wide.itemsize)))
    table = scratch[: rows * block * wide.itemsize].view(wide).view(rows, -1)
    for start in range(0, base.numel(), block):
        here = slice(start, start + block)
        room = table[:, : len(base[here])].unbind()
        for end, out in copies:
            out[here].copy_(end[here])
        if not points:
            continue
        # What has the dtype of the computation is read, and below written, where it lies.
        a, b = (
            end[here] if end.dtype == wide else room[at].copy_(end[here])
            for end, at in ((base, _BASE), (tuned, _TUNED))
        )
        torch.sub(b, a, out=room[delta_at])
        for weight, same_weight in points.items():
            product = torch.mul(room[delta_at], weight, out=room[product_at])
            for from_base, out in same_weight:
                point = out[here] if out.dtype == wide else room[point_at]
                torch.add(a, product, out=point) if from_base else torch.sub(b, product, out=point)
                if out.dtype != wide:
                    out[here].copy_(point)


def nearer_end(ratio: float, wide: torch.dtype) -> tuple[float, bool]:
    """Return how far a point lies from its nearer end, rounded once to a dtype, and whether that end is base."""
    from_base = ratio < 0.5
    weight = ratio if from_base else 1.0 - ratio
    return (weight if wide == torch.float64 else float(np.float32(weight))), from_base
