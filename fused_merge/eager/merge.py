"""Merging finished models: theta = theta0 + scale * (F(tau_1) ⊕ ... ⊕ F(tau_K)), with tau_i = theta_i - theta0.

A method is a row of `MERGE_METHODS`. All arithmetic is fp32 (fp64 where a tensor is fp64) and rounded once, to the
dtype of the result. `merge` is elementwise but for what a tensor as a whole decides: the threshold of a trim
(`trim_threshold`) and the angle of slerp (`slerp_coefficients`). With these given, a block of a tensor has the bits
that the same elements have in the whole.

Sources: task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089); DARE, Yu et al. 2024 (arXiv 2311.03099); TIES,
Yadav et al. 2023 (arXiv 2306.01708); model soups, Wortsman et al. 2022 (arXiv 2203.05482); slerp, Shoemake 1985,
"Animating rotation with quaternion curves". Where a paper leaves the weighted case open, mergekit 0.1.5 decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.philox import DOMAIN_TAU, MaskKey
from fused_merge.eager.shard import ShardIndex
from fused_merge.eager.sparsify import kth_largest, pattern, random
from fused_merge.eager.sums import inner_product
from fused_merge.names import tensor_id

# Two directions nearer to one line than this have no useful arc between them.
COLLINEAR = 0.9995


class MergeMethod(NamedTuple):
    """A row of the table, or, with its options decided, what one merge does."""

    sparsify: str  # F of each delta: "none", "random" or "magnitude" of `fused_merge.eager.sparsify.SPARSIFY`
    elect: bool  # elect a sign before the sum; what opposes it takes no part
    normalize: bool  # divide by the sum of the weights, under a vote of those that agree
    rescale: bool  # divide what a random drop keeps by the density
    paper: str
    deltas: bool = True  # the sum is of differences from a base, else of the models themselves
    spherical: bool = False  # the weights of base and model come from t and the angle between them

    @property
    def has_base(self) -> bool:
        """Whether one of the models is where the others start from."""
        return self.deltas or self.spherical


MERGE_METHODS: dict[str, MergeMethod] = {
    "linear": MergeMethod("none", False, True, False, "Wortsman et al. 2022 (arXiv 2203.05482)", deltas=False),
    "slerp": MergeMethod("none", False, False, False, "Shoemake 1985", deltas=False, spherical=True),
    "task_arithmetic": MergeMethod("none", False, False, False, "Ilharco et al. 2023 (arXiv 2212.04089)"),
    "ties": MergeMethod("magnitude", True, True, False, "Yadav et al. 2023 (arXiv 2306.01708)"),
    "dare_linear": MergeMethod("random", False, False, True, "Yu et al. 2024 (arXiv 2311.03099)"),
    "dare_ties": MergeMethod("random", True, False, True, "Yu et al. 2024 (arXiv 2311.03099), with a vote as in TIES"),
}


def merge_method(
    method: str, *, normalize: bool | None = None, rescale: bool | None = None, scale: float = 1.0
) -> MergeMethod:
    """Look up a row of the table and decide its options.

    Args:
        method: a key of `MERGE_METHODS`.
        normalize: divide by the sum of the weights; None is what the row does.
        rescale: divide what a random drop keeps by the density; None is what the row does.
        scale: what the merged delta is multiplied by; only rows of deltas have it.

    Raises:
        ValueError: for an unknown name, or an option that the row lacks.
    """
    if method not in MERGE_METHODS:
        raise ValueError(f"unknown merge method {method!r}; the rows are {', '.join(map(repr, MERGE_METHODS))}")
    row = MERGE_METHODS[method]
    if normalize is not None and row.spherical:
        raise ValueError(f"method {method!r} has no option 'normalize': the angle decides its weights; leave it out")
    if rescale is not None and row.sparsify != "random":
        raise ValueError(f"method {method!r} has no option 'rescale': it drops nothing at random; leave it out")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")
    if scale != 1.0 and not row.deltas:
        raise ValueError(f"method {method!r} has no option 'scale': it sums whole models; leave it out")
    return row._replace(
        normalize=row.normalize if normalize is None else normalize,
        rescale=row.rescale if rescale is None else rescale,
    )


def check_coefficients(
    method: str,
    models: int,
    weights: Sequence[float],
    densities: Sequence[float] | None = None,
    *,
    normalize: bool | None = None,
) -> None:
    """Raise ValueError for the first weight or density of a tensor that `merge` could not use.

    Args:
        method: a key of `MERGE_METHODS`.
        models: how many there are besides the base.
        weights: of the models; for slerp, t.
        densities: of the models, or None.
        normalize: as for `merge_method`.
    """
    row = merge_method(method, normalize=normalize)
    if models < 1:
        raise ValueError("there is no model to merge; pass at least one")
    if row.spherical and models != 1:
        raise ValueError(f"method {method!r} goes from the base to one model, got {models} models")
    if len(weights) != models:
        raise ValueError(f"{models} models need as many weights, got {len(weights)}")
    for weight in weights:
        if not math.isfinite(weight):
            raise ValueError(f"a weight must be finite, got {weight}")
    if row.normalize and not row.deltas and abs(sum(weights)) < 1e-8:
        raise ValueError(f"a mean of models divides by the sum of {list(weights)}, which is 0; use normalize=False")
    if densities is None:
        return
    if row.sparsify == "none":
        raise ValueError(f"method {method!r} has no option 'density': it keeps everything; leave it out")
    if len(densities) != models:
        raise ValueError(f"{models} models need as many densities, got {len(densities)}")
    for density in densities:
        if not 0.0 < density <= 1.0:
            raise ValueError(f"density must lie in (0, 1], got {density}")


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that a merge of these tensors computes in: fp32, or fp64 where one of them is fp64."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def trim_threshold(x: Tensor, density: float) -> int:
    """Return what `trim` keeps the largest k = max(1, floor(density * n)) magnitudes of x with.

    Args:
        x: fp32 or fp64, any shape: one delta, or those of a whole model joined to one vector.
        density: in (0, 1]; 1 keeps everything.

    Returns:
        The integer pattern of the k-th largest |x|; 0, which keeps everything, also where x is empty.
    """
    if density == 1.0 or x.numel() == 0:
        return 0
    return int(kth_largest(x, density))


def trim(x: Tensor, threshold: int) -> Tensor:
    """Return x where the integer pattern of |x| is at least `threshold`, else 0: ties at the threshold all stay.

    NaN lies above every threshold and stays.
    """
    return torch.where(pattern(x) >= threshold, x, 0.0)


def drop(x: Tensor, density: float, key: MaskKey, *, rescale: bool) -> Tensor:
    """Return x where its Philox words keep it, divided by the density if rescaled, else 0 (DARE, equation 2).

    Args:
        x: fp32 or fp64, any shape.
        density: probability of keeping an element, in (0, 1]; 1 returns x.
        key: of the random mask.
        rescale: whether there is a division, so that the mean over masks is x.
    """
    kept = random(x, density, key)
    return kept / _scalar(density, x) if rescale and density < 1.0 else kept


def consensus(deltas: Sequence[Tensor], weights: Sequence[float], *, elect: bool, normalize: bool) -> Tensor:
    """Return the weighted sum of the deltas, each addition in the order of the list.

    With a vote, the sign of the sum of all weighted deltas is elected, 0 counting as +, and only weighted deltas of
    that sign stay; a zero has no sign and agrees with nobody, NaN opposes nothing and stays (TIES, section 3).
    Normalized, the sum is divided by that of the weights, under a vote by that of the weights which agree (the
    disjoint mean); where those sum to 0 (without a vote: to less than 1e-8 in magnitude) it is divided by 1.

    Args:
        deltas: one per model, all of one shape, all fp32 or all fp64; not changed.
        weights: one per model, rounded once to that dtype.
        elect: whether there is a vote.
        normalize: whether there is a division.

    Returns:
        A tensor of the same shape and dtype.
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
        divisor = _sum([torch.where(chosen, share, 0.0) for chosen, share in zip(agrees, shares, strict=True)])
        return total / torch.where(divisor == 0, 1.0, divisor)
    divisor = _sum(shares)
    return total / torch.where(divisor.abs() < 1e-8, 1.0, divisor)


def linear(thetas: Sequence[Tensor], weights: Sequence[float], *, normalize: bool = True) -> Tensor:
    """Return the weighted mean of models, or their weighted sum: a consensus without a vote.

    Args:
        thetas: all of one shape, all fp32 or all fp64.
        weights: one per model.
        normalize: divide by the sum of the weights.
    """
    return consensus(thetas, weights, elect=False, normalize=normalize)


def slerp_coefficients(t: float, norm_a: float, norm_b: float, dot: float) -> tuple[float, float]:
    """Return what to multiply a and b by, so that their sum lies on the arc from a (t = 0) to b (t = 1).

    sin((1 - t) * phi) / sin(phi) and sin(t * phi) / sin(phi), phi the angle between a and b; 1 - t and t, the straight
    line, where the two lie nearly on one (|cos phi| > 0.9995) or have no angle: one of them is zero, or a norm is not
    finite. Computed in fp64.

    Args:
        t: where on the arc.
        norm_a: |a|.
        norm_b: |b|.
        dot: <a, b>.
    """
    norms = norm_a * norm_b
    cosine = dot / norms if 0.0 < norms < math.inf else math.nan
    if not abs(cosine) <= COLLINEAR:
        return 1.0 - t, t
    phi = math.acos(cosine)
    return math.sin((1.0 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Return the point t of the arc from a to b, each taken as one long vector.

    Args:
        a: fp32 or fp64, any shape.
        b: the same.
        t: 0 is a, 1 is b.

    Returns:
        A tensor of the same shape and dtype: `linear([a, b], slerp_coefficients(...), normalize=False)`.
    """
    norm_a, norm_b = (math.sqrt(inner_product(x, x)) for x in (a, b))
    return linear([a, b], slerp_coefficients(t, norm_a, norm_b, float(inner_product(a, b))), normalize=False)


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
    thresholds: Sequence[int] | None = None,
    shard: ShardIndex | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the merge of one tensor of several models.

    A block of a tensor is merged with `shard` and, if the method trims, `thresholds`; slerp has an angle of the whole
    tensor, and its blocks are those of "linear" with `slerp_coefficients` and `normalize=False`.

    Args:
        base: theta0, floating, any shape; for slerp the start of the arc; None for "linear", which has no base.
        thetas: the models, each of the same shape; nothing is changed.
        weights: one per model, finite; for slerp `[t]`.
        method: a key of `MERGE_METHODS`.
        name: of the tensor; it keys the random masks.
        densities: the share of each delta to keep, in (0, 1]; None keeps everything.
        normalize: divide by the sum of the weights; None is what the row does.
        rescale: divide what a random drop keeps by its density; None is what the row does.
        scale: what the merged delta is multiplied by; 1 multiplies by nothing.
        seed: of the random masks; that of model i, counted from 0, is drawn at step i, so that the first is the one
            of `fused_merge.eager.sparsify.sparsify_tau`.
        thresholds: of `trim`, one per model, in place of densities; None takes those of the tensor itself.
        shard: which elements of the unsharded tensor these are; None for a whole one.
        dtype: of the result; None is that of the base, without one of the first model.

    Raises:
        ValueError: for an unknown method, an option that the row lacks, a number out of range, a wrong count, tensors
            of different shapes, or a base too many or missing.
    """
    row = merge_method(method, normalize=normalize, rescale=rescale, scale=scale)
    check_coefficients(method, len(thetas), weights, densities, normalize=normalize)
    if (base is None) == row.has_base:
        raise ValueError(f"method {method!r} needs {'a base' if base is None else 'no base; pass None'}")
    tensors = [*thetas] if base is None else [base, *thetas]
    for theta in tensors[1:]:
        if theta.shape != tensors[0].shape:
            raise ValueError(f"{name!r} is {list(tensors[0].shape)} and {list(theta.shape)}; all models need one shape")
    if thresholds is not None and (row.sparsify != "magnitude" or len(thresholds) != len(thetas)):
        raise ValueError(
            f"method {method!r} of {len(thetas)} models got {len(thresholds)} thresholds; one per model trims"
        )
    if shard is not None and (row.spherical or (row.sparsify == "magnitude" and thresholds is None)):
        raise ValueError(
            f"a block of {name!r} cannot tell what {method!r} takes from the whole tensor; pass thresholds, or, for "
            "slerp, the coefficients to 'linear'"
        )

    wide = wide_dtype(*tensors)
    models = [theta.to(wide) for theta in thetas]
    if base is None:
        result = linear(models, weights, normalize=row.normalize)
    elif row.spherical:
        result = slerp(base.to(wide), models[0], weights[0])
    else:
        start = base.to(wide)
        deltas = [model - start for model in models]
        shares = [1.0] * len(deltas) if densities is None else densities
        if row.sparsify == "magnitude":
            if thresholds is None:
                thresholds = [trim_threshold(x, share) for x, share in zip(deltas, shares, strict=True)]
            deltas = [trim(x, threshold) for x, threshold in zip(deltas, thresholds, strict=True)]
        elif row.sparsify == "random":
            key = MaskKey(seed=seed, step=0, tensor_id=tensor_id(name), domain=DOMAIN_TAU, shard=shard)
            deltas = [
                drop(x, share, key._replace(step=i), rescale=row.rescale)
                for i, (x, share) in enumerate(zip(deltas, shares, strict=True))
            ]
        delta = consensus(deltas, weights, elect=row.elect, normalize=row.normalize)
        if scale != 1.0:
            delta = _scalar(scale, delta) * delta
        result = start + delta
    return result.to(dtype or tensors[0].dtype)


def _scalar(value: float, like: Tensor) -> Tensor:
    """Return a number, rounded once, beside a tensor: dividing by one of the host may multiply by its inverse."""
    return torch.tensor(value, dtype=like.dtype, device=like.device)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    # From the first term on: a 0 before it would turn -0 into 0.
    return reduce(torch.add, terms)
