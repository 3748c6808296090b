"""Merging finished models: theta = theta0 + scale * (F(tau_1) ⊕ ... ⊕ F(tau_K)), with tau_i = theta_i - theta0.

The methods are those of `fused_merge.methods.MERGE_METHODS`. All arithmetic is fp32 (fp64 where a tensor is fp64),
rounded once to the dtype of the result. A merge is elementwise except for what a tensor as a whole decides: the
threshold of a trim (`trim_threshold`) and the angle of slerp (`slerp_coefficients`). With these given, `merge_block`
returns for a block of a tensor the bits that `merge` returns for the same elements of the whole tensor.

Sources: task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089); DARE, Yu et al. 2024 (arXiv 2311.03099); TIES,
Yadav et al. 2023 (arXiv 2306.01708); model soups, Wortsman et al. 2022 (arXiv 2203.05482); slerp, Shoemake 1985,
"Animating rotation with quaternion curves". Where a paper leaves the weighted case open, mergekit 0.1.5 decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from fused_merge.eager.philox import DOMAIN_TAU, MaskKey
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.sparsify import kth_largest, pattern, random
from fused_merge.eager.sums import inner_product
from fused_merge.methods import MergeMethod, check_coefficients, merge_method
from fused_merge.names import tensor_id

# Two directions with a larger |cosine| than this have no useful arc between them.
COLLINEAR = 0.9995


def trim_threshold(x: Tensor, density: float) -> int:
    """Return the threshold with which `trim` keeps the largest k = max(1, floor(density * n)) magnitudes of x.

    It is the integer pattern of the k-th largest |x|, or 0, which keeps everything, at density 1 and for an empty x. x
    is fp32 or fp64, of any shape: one delta, or those of a whole model joined to one vector.
    """
    return 0 if density == 1.0 or x.numel() == 0 else int(kth_largest(x, density))


def trim(x: Tensor, threshold: int) -> Tensor:
    """Return x where the integer pattern of |x| is at least `threshold`, else 0: ties at the threshold all stay.

    NaN lies above every threshold and stays.
    """
    return torch.where(pattern(x) >= threshold, x, 0.0)


def drop(x: Tensor, density: float, key: MaskKey, *, rescale: bool) -> Tensor:
    """Return x where its random mask keeps it, divided by the density if rescaled, else 0 (DARE, equation 2).

    x is fp32 or fp64, of any shape; `density`, in (0, 1], is the probability of keeping an element. Rescaled, the mean
    over masks is x.
    """
    kept = random(x, density, key)
    return kept / _scalar(density, x) if rescale and density < 1.0 else kept


def consensus(deltas: Sequence[Tensor], weights: Sequence[float], *, elect: bool, normalize: bool) -> Tensor:
    """Return the weighted sum of deltas or of models, each addition in the order of the list.

    With a vote, the sign of the sum of all weighted deltas is elected, where 0 counts as +, and only weighted deltas of
    that sign stay; a zero has no sign and never agrees, NaN never disagrees and stays (TIES, section 3). A normalized
    sum is divided by the sum of the weights, under a vote by the sum of the weights that agree (the disjoint mean);
    where that is 0 (without a vote: less than 1e-8 in magnitude) the sum is divided by 1.

    The deltas are all of one shape, all fp32 or all fp64, as the result, and not changed; weights are rounded once to
    that dtype.
    """
    shares = [_scalar(weight, deltas[0]) for weight in weights]
    terms = [share * delta for share, delta in zip(shares, deltas, strict=True)]
    if elect:
        positive = _sum(terms) >= 0
        agrees = [~torch.where(positive, term <= 0, term >= 0) for term in terms]
        terms = [torch.where(chosen, term, 0.0) for chosen, term in zip(agrees, terms, strict=True)]
    total = _sum(terms)
    if not normalize:
        return total
    if elect:
        shares = [torch.where(chosen, share, 0.0) for chosen, share in zip(agrees, shares, strict=True)]
    divisor = _sum(shares)
    return total / torch.where(divisor == 0 if elect else divisor.abs() < 1e-8, 1.0, divisor)


def slerp_coefficients(t: float, norm_a: float, norm_b: float, dot: float) -> tuple[float, float]:
    """Return the factors of a and b with which their sum lies on the arc from a (t = 0) to b (t = 1).

    They are sin((1 - t) * phi) / sin(phi) and sin(t * phi) / sin(phi), where phi is the angle between a and b. Where
    the two are nearly collinear (|cos phi| > 0.9995) or have no angle, because one is zero or a norm is not finite,
    they are 1 - t and t, as on a straight line. Computed in fp64 from |a|, |b| and <a, b>.
    """
    norms = norm_a * norm_b
    cosine = dot / norms if 0.0 < norms < math.inf else math.nan
    if not abs(cosine) <= COLLINEAR:
        return 1.0 - t, t
    phi = math.acos(cosine)
    return math.sin((1.0 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the point at t on the arc from a (t = 0) to b (t = 1), each taken as one long vector.

    It is the sum of a and b, of one shape, both fp32 or both fp64, with `slerp_coefficients` as weights.
    """
    norm_a, norm_b = (math.sqrt(inner_product(x, x)) for x in (a, b))
    weights = slerp_coefficients(t, norm_a, norm_b, float(inner_product(a, b)))
    return consensus([a, b], weights, elect=False, normalize=False)


def merge(
    base: Tensor | None,
    thetas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    method: str,
    name: str,
    densities: Sequence[float] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the merge of one whole tensor of several models.

    Args:
        base: theta0, floating, any shape; for slerp the start of the arc; None for "linear", which has no base.
        thetas: the models, each of the same shape; nothing is changed.
        weights: one per model, finite; for slerp `[t]`.
        method: a key of `MERGE_METHODS`.
        name: name of the tensor; it keys the random masks.
        densities: the share of each delta to keep, in (0, 1]; None keeps everything.
        normalize, rescale, scale, seed: as for `fused_merge.merge_checkpoints`.
        dtype: dtype of the result; None is that of the base, without a base that of the first model.

    Raises:
        ValueError: for an unknown method, an option that the method lacks, a number out of range, a wrong count,
            tensors of different shapes, a missing base, or a base for a method that has none.
    """
    decided = merge_method(method, normalize=normalize, rescale=rescale, scale=scale)
    check_coefficients(decided, len(thetas), weights, densities)
    if (base is None) == decided.has_base:
        raise ValueError(f"method {method!r} needs {'a base' if base is None else 'no base; pass None'}")
    tensors = [*thetas] if base is None else [base, *thetas]
    for theta in tensors[1:]:
        if theta.shape != tensors[0].shape:
            raise ValueError(f"{name!r} is {list(tensors[0].shape)} and {list(theta.shape)}; all models need one shape")
    dtype = dtype or tensors[0].dtype
    wide = compute_dtype(*(tensor.dtype for tensor in tensors))
    if base is not None and decided.spherical:
        return slerp(base.to(wide), thetas[0].to(wide), weights[0]).to(dtype)
    thresholds = None
    if base is not None and decided.sparsify == "magnitude":
        deltas = [theta.to(wide) - base.to(wide) for theta in thetas]
        thresholds = [trim_threshold(x, p) for x, p in zip(deltas, densities or [1.0] * len(deltas), strict=True)]
    key = mask_key(name, seed)
    return merge_block(base, thetas, weights, decided, densities, thresholds, key=key, dtype=dtype)


def merge_block(
    base: Tensor | None,
    thetas: Sequence[Tensor],
    weights: Sequence[float],
    method: MergeMethod,
    densities: Sequence[float] | None,
    thresholds: Sequence[int] | None,
    *,
    key: MaskKey,
    dtype: torch.dtype,
) -> Tensor:
    """Return the merge of a block of one tensor; what `merge` has checked is not checked again.

    `method` is as `merge_method` returned it; a block of slerp is one of "linear" over base and model, with
    `slerp_coefficients` as weights and without normalization. `thresholds`, one per model, are for methods that trim,
    and `key` is as `mask_key` returned it, with the block as its shard.
    """
    tensors = thetas if base is None else (base, *thetas)
    wide = compute_dtype(*(tensor.dtype for tensor in tensors))
    models = [theta.to(wide) for theta in thetas]
    if base is None:
        return consensus(models, weights, elect=method.elect, normalize=method.normalize).to(dtype)
    start = base.to(wide)
    deltas = [model - start for model in models]
    if method.sparsify == "magnitude":
        assert thresholds is not None, f"{method.name!r} merges blocks with thresholds of the whole tensor"
        deltas = [trim(x, threshold) for x, threshold in zip(deltas, thresholds, strict=True)]
    elif method.sparsify == "random" and densities is not None:
        deltas = [
            drop(x, density, key._replace(step=i), rescale=method.rescale)
            for i, (x, density) in enumerate(zip(deltas, densities, strict=True))
        ]
    delta = consensus(deltas, weights, elect=method.elect, normalize=method.normalize)
    if method.scale != 1.0:
        delta = _scalar(method.scale, delta) * delta
    return (start + delta).to(dtype)


def mask_key(name: str, seed: int) -> MaskKey:
    """Return the key of the random masks of a whole tensor, those of `fused_merge.eager.sparsify.sparsify_tau`.

    The mask of model i, counted from 0, is drawn at step i.
    """
    return MaskKey(seed=seed, step=0, tensor_id=tensor_id(name), domain=DOMAIN_TAU)


def _scalar(value: float, like: Tensor) -> Tensor:
    """Return a number, rounded once, as a tensor: dividing by a Python number may multiply by its inverse."""
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    # The sum starts from the first term, since adding it to 0 would turn -0 into 0.
    return reduce(torch.add, terms)
