"""Merging finished models: theta = theta0 + scale * (F(tau_1) ⊕ ... ⊕ F(tau_K)), with tau_i = theta_i - theta0.

The methods are those of `fused_merge.methods.MERGE_METHODS`. All arithmetic is fp32 (fp64 where a tensor is fp64),
rounded once to the dtype of the result. A merge is elementwise except for what a tensor as a whole decides: the
thresholds of a trim (`trim_bounds`) and the angles of slerp and of model stock (`weighted_sum`). With these given,
`merge_block` returns for a block of a tensor, for DELLA one of whole rows, the bits that `merge` returns for the same
elements of the whole tensor.

Sources: task arithmetic, Ilharco et al. 2023 (arXiv 2212.04089); DARE, Yu et al. 2024 (arXiv 2311.03099); TIES,
Yadav et al. 2023 (arXiv 2306.01708); breadcrumbs, Davari & Belilovsky 2023 (arXiv 2312.06795); DELLA, Deep et al. 2024
(arXiv 2406.11617); model stock, Jang et al. 2024 (arXiv 2403.19522); nearswap, the model card of alchemonaut's
QuartetAnemoi-70B, 2024; model soups, Wortsman et al. 2022 (arXiv 2203.05482); slerp, Shoemake 1985, "Animating rotation
with quaternion curves". Where a paper leaves the weighted case open, mergekit 0.1.5 decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.philox import DOMAIN_TAU, MaskKey, random_words
from fused_merge.eager.precision import compute_dtype
from fused_merge.eager.sparsify import kept_count, pattern, random
from fused_merge.eager.sums import inner_product
from fused_merge.methods import MARGINS, MergeMethod, check_coefficients, merge_method
from fused_merge.names import tensor_id

# Two directions with a larger |cosine| than this have no useful arc between them.
COLLINEAR = 0.9995


class Coefficients(NamedTuple):
    """The numbers that one tensor is merged with, one of each for every model, in the order of the models."""

    weights: tuple[float, ...]  # for slerp and nearswap t alone
    densities: tuple[float, ...] | None = None  # None keeps everything
    margins: tuple[float, ...] | None = None  # gamma of breadcrumbs, or epsilon of DELLA
    bounds: tuple[tuple[int, ...], ...] | None = None  # `trim_bounds`, for methods that trim


def kept_ranks(numel: int, density: float, gamma: float | None = None) -> tuple[int, ...]:
    """Return the rank of the smallest magnitude that a trim of `numel` elements keeps, 1 being the largest of all.

    It is k = max(1, floor(density * numel)). With a gamma the largest floor(gamma * numel) go first, at most all but k;
    then the second number is the rank of the largest magnitude that stays (breadcrumbs).
    """
    k = kept_count(numel, density)
    if gamma is None:
        return (k,)
    cut = min(math.floor(gamma * numel), numel - k)
    return cut + k, cut + 1


def trim_bounds(x: Tensor, density: float, gamma: float | None = None) -> tuple[int, ...]:
    """Return the least and, with a gamma, the largest magnitude that `trim` keeps: integer patterns of `kept_ranks`.

    At density 1 and for an empty x the least is 0, which keeps everything. x is fp32 or fp64, of any shape: one delta,
    or those of a whole model joined to one vector.
    """
    if density == 1.0 or x.numel() == 0:
        return (0,)
    patterns, n = pattern(x).flatten(), x.numel()
    return tuple(int(patterns.kthvalue(n - rank + 1).values) for rank in kept_ranks(n, density, gamma))


def trim(x: Tensor, least: int, most: int | None = None) -> Tensor:
    """Return x where the integer pattern of |x| is at least `least` and at most `most`, else 0: ties at both stay.

    NaN lies above every bound and stays even so.
    """
    kept = pattern(x) >= least
    if most is not None:
        kept &= (pattern(x) <= most) | x.isnan()
    return torch.where(kept, x, 0.0)


def drop(x: Tensor, density: float, key: MaskKey, *, rescale: bool) -> Tensor:
    """Return x where its random mask keeps it, divided by the density if rescaled, else 0 (DARE, equation 2).

    x is fp32 or fp64, of any shape; `density`, in (0, 1], is the probability of keeping an element. Rescaled, the mean
    over masks is x.
    """
    kept = random(x, density, key)
    return kept / _scalar(density, x) if rescale and density < 1.0 else kept


def drop_by_rank(x: Tensor, density: float, epsilon: float, key: MaskKey, *, rescale: bool) -> Tensor:
    """Return x where its random mask keeps it, large magnitudes of a row more often, else 0 (MAGPRUNE of DELLA).

    In a row of n elements the one of rank r, 0 for the smallest magnitude, is kept with the probability
    p = density - epsilon + 2 * epsilon * r / (n - 1), and divided by p if rescaled: then the mean over masks is x. Of
    equal magnitudes the first has the lower rank; NaN has the highest. `density` is the mean of p, and that of a row of
    one element. The paper's epsilon is the whole width, 2 * epsilon here, as in mergekit.

    x is fp32 or fp64 `[..., n]`; `density` - `epsilon` is above 0 and `density` + `epsilon` at most 1.
    """
    n = x.shape[-1]
    ranks = pattern(x).argsort(dim=-1, stable=True).argsort(dim=-1).double()
    p = density - epsilon + 2.0 * epsilon * (ranks / (n - 1) if n > 1 else ranks + 0.5)
    kept = random_words(x.numel(), key, device=x.device).view(x.shape) < (p * 2**32).floor()
    return torch.where(kept, x / p.to(x.dtype) if rescale else x, 0.0)


def nearswap(base: Tensor, model: Tensor, t: float) -> Tensor:
    """Return (1 - w) * base + w * model with w = min(1, t / |model - base|) for each element.

    That is the model where the two are at most t apart, and elsewhere the base, moved by t towards the model. Both are
    fp32 or both fp64, of one shape; t is not negative.
    """
    delta = model - base
    at_most = _scalar(t, delta)
    return torch.where(delta.abs() <= at_most, model, base + delta.clamp(-at_most, at_most))


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


def stock_ratio(products: Sequence[Sequence[float]]) -> float:
    """Return t with which base + t * mean(deltas) is the merge of model stock: N c / (1 + (N - 1) c).

    c is the mean cosine of the angles between any two of N deltas, whose inner products are given; a pair without an
    angle, because one is zero or a norm is not finite, counts as a right one. The paper's angles are at most right
    ones, so that a negative c is an estimate of 0. Computed in fp64.
    """
    count, cosines = len(products), []
    for i, j in combinations(range(count), 2):
        norms = math.sqrt(products[i][i]) * math.sqrt(products[j][j])
        cosines.append(products[i][j] / norms if 0.0 < norms < math.inf else 0.0)
    cosine = max(0.0, sum(cosines) / len(cosines))
    return count * cosine / (1.0 + (count - 1) * cosine)


def weighted_sum(
    method: MergeMethod, weights: Sequence[float], products: Sequence[Sequence[float]]
) -> tuple[MergeMethod, tuple[float, ...]]:
    """Return the sum, and its weights, that a method with `has_angles` is for one tensor.

    `products` are the inner products of what stands at its angles: the deltas if it sums those, the two models, or base
    and model. The sum is "task_arithmetic" or "linear", over base and model too.
    """
    if method.weights_from == "stock":
        stock = merge_method("task_arithmetic", normalize=True)
        return stock._replace(scale=stock_ratio(products)), tuple(weights)
    t = weights[0] if method.takes_t else weights[1] / (weights[0] + weights[1])
    (a, both), (_, b) = products
    name = "task_arithmetic" if method.deltas else "linear"
    return merge_method(name, normalize=False), slerp_coefficients(t, math.sqrt(a), math.sqrt(b), both)


def merge(
    base: Tensor | None,
    thetas: Sequence[Tensor],
    weights: Sequence[float],
    *,
    method: str,
    name: str,
    densities: Sequence[float] | None = None,
    margins: Sequence[float] | None = None,
    normalize: bool | None = None,
    rescale: bool | None = None,
    scale: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the merge of one whole tensor of several models.

    Args:
        base: theta0, floating, any shape; for slerp the start of the arc; None for "linear", which has no base.
            "nuslerp" takes both.
        thetas: the models, each of the same shape; nothing is changed.
        weights: one per model, finite; for slerp and nearswap `[t]`.
        method: a key of `MERGE_METHODS`.
        name: name of the tensor; it keys the random masks.
        densities: the share of each delta to keep, in (0, 1]; None keeps everything.
        margins: gamma of breadcrumbs or epsilon of DELLA for each model; None is the default of `MARGINS`.
        normalize, rescale, scale, seed: as for `fused_merge.merge_checkpoints`.
        dtype: dtype of the result; None is that of the base, without a base that of the first model.

    Raises:
        ValueError: for an unknown method, an option that the method lacks, a number out of range, a wrong count,
            tensors of different shapes, a missing base, or a base for a method that has none.
    """
    decided = merge_method(method, normalize=normalize, rescale=rescale, scale=scale).on_base(base is not None)
    if margins is None and densities is not None and decided.sparsify in MARGINS:
        margins = [MARGINS[decided.sparsify][1]] * len(thetas)
    check_coefficients(decided, len(thetas), weights, densities, margins)
    tensors = [*thetas] if base is None else [base, *thetas]
    for theta in tensors[1:]:
        if theta.shape != tensors[0].shape:
            raise ValueError(f"{name!r} is {list(tensors[0].shape)} and {list(theta.shape)}; all models need one shape")
    dtype = dtype or tensors[0].dtype
    wide = compute_dtype(*(tensor.dtype for tensor in tensors))
    ends = [tensor.to(wide) for tensor in tensors]
    if decided.deltas:
        ends = [end - ends[0] for end in ends[1:]]
    bounds = None
    if decided.has_angles:
        decided, weights = weighted_sum(decided, weights, [[float(inner_product(x, y)) for y in ends] for x in ends])
        if not decided.has_base:
            base, thetas = None, tensors
    elif decided.has_thresholds and densities is not None:
        gammas: Sequence[float | None] = margins or [None] * len(ends)
        bounds = tuple(trim_bounds(*each) for each in zip(ends, densities, gammas, strict=True))
    shares = [None if each is None else tuple(each) for each in (densities, margins)]
    own = Coefficients(tuple(weights), shares[0], shares[1], bounds)
    row = tensors[0].shape[-1] if tensors[0].ndim else 1
    return merge_block(base, thetas, decided, own, row=row, key=mask_key(name, seed), dtype=dtype)


def merge_block(
    base: Tensor | None,
    thetas: Sequence[Tensor],
    method: MergeMethod,
    own: Coefficients,
    *,
    row: int,
    key: MaskKey,
    dtype: torch.dtype,
) -> Tensor:
    """Return the merge of a block of one tensor; what `merge` has checked is not checked again.

    `method` is as `merge_method` returned it, or `weighted_sum` for one that has angles: then a block of slerp is one
    of "linear" over base and model. `own` are the numbers of the tensor, `row` is the length of its last dimension, of
    which DELLA takes whole rows, and `key` is as `mask_key` returned it, with the block as its shard.
    """
    tensors = thetas if base is None else (base, *thetas)
    wide = compute_dtype(*(tensor.dtype for tensor in tensors))
    models = [theta.to(wide) for theta in thetas]
    if base is None:
        return consensus(models, own.weights, elect=method.elect, normalize=method.normalize).to(dtype)
    start = base.to(wide)
    if method.weights_from == "distance":
        return nearswap(start, models[0], own.weights[0]).to(dtype)
    deltas = [model - start for model in models]
    return merge_deltas(start, deltas, method, own, row=row, key=key, dtype=dtype)


def merge_deltas(
    start: Tensor,
    deltas: Sequence[Tensor],
    method: MergeMethod,
    own: Coefficients,
    *,
    row: int,
    key: MaskKey,
    dtype: torch.dtype,
) -> Tensor:
    """Return the merge of a block of one tensor of which the deltas are known: as `merge_block`, in the wide dtype."""
    kept = [_sparsified(i, delta, method, own, row, key._replace(step=i)) for i, delta in enumerate(deltas)]
    delta = consensus(kept, own.weights, elect=method.elect, normalize=method.normalize)
    if method.scale != 1.0:
        delta = _scalar(method.scale, delta) * delta
    return (start + delta).to(dtype)


def _sparsified(i: int, x: Tensor, method: MergeMethod, own: Coefficients, row: int, key: MaskKey) -> Tensor:
    """Return F(x) of the delta of model i."""
    if own.densities is None or own.densities[i] == 1.0 or x.numel() == 0:
        return x
    if method.sparsify == "random":
        return drop(x, own.densities[i], key, rescale=method.rescale)
    if method.sparsify == "ranked":
        assert own.margins is not None
        kept = drop_by_rank(x.reshape(-1, row), own.densities[i], own.margins[i], key, rescale=method.rescale)
        return kept.view(x.shape)
    assert own.bounds is not None, f"{method.name!r} merges blocks with bounds of the whole tensor"
    return trim(x, *own.bounds[i])


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
