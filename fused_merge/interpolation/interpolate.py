"""Tensors and state dicts at many ratios of the path between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from fused_merge import functional
from fused_merge.io.match import match
from fused_merge.io.sources import open_source
from fused_merge.names import canonical_name
from fused_merge.per_tensor import PerTensor, check_ratios, is_tuned, per_tensor

# Elements handed over at once: temporaries stay small whatever the tensor.
_CHUNK = 1 << 20


@overload
def interpolate(base: Tensor, tuned: Tensor, ratios: Sequence[float], *, impl: str = "auto") -> Tensor: ...


@overload
def interpolate(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], ratios: Sequence[PerTensor], *, impl: str = "auto"
) -> list[dict[str, Tensor]]: ...


def interpolate(
    base: Tensor | Mapping[str, Tensor],
    tuned: Tensor | Mapping[str, Tensor],
    ratios: Sequence[PerTensor],
    *,
    impl: str = "auto",
) -> Tensor | list[dict[str, Tensor]]:
    """Return theta(r) = base + r * (tuned - base) for R ratios, from one read of the two.

    Computed in fp32 (fp64 for fp64 tensors) from the nearer end and rounded once; r = 0 and r = 1 copy bits.
    Source: Lin et al. 2024 (arXiv 2309.06256). Nothing is mutated, and no gradient flows.

    Args:
        base: theta0: a floating tensor, or a state dict.
        tuned: theta1: the same shape, dtype and device, or names. A tied weight may be listed by one state dict only.
        ratios: R finite ratios; below 0 or above 1 they extrapolate. For state dicts also mappings, such as
            `LayerRatios`, from names or regular expressions on whole names to ratios.
        impl: `"auto"`, `"triton"`, `"compiled"` or `"eager"`, as for `functional.interpolate`.

    Returns:
        One tensor `[R, *shape]`, or a list of R dicts under the names of `base`, where tied names share a tensor and
        integer tensors are copies of `tuned`'s (`base`'s at r = 0).

    Raises:
        ValueError: for a ratio that is not finite, or tensors that do not match; the sentence names them.
        TypeError: if the two are not both tensors or both mappings.
    """
    points = check_ratios(ratios)
    if isinstance(base, Tensor) and isinstance(tuned, Tensor):
        if not all(isinstance(point, float) for point in points):
            raise TypeError("two tensors have no names, so their ratios must be numbers; pass state dicts")
        return _points(base.detach(), tuned.detach(), points, impl)  # type: ignore[arg-type]
    if not (isinstance(base, Mapping) and isinstance(tuned, Mapping)):
        raise TypeError(
            f"base and tuned must be two tensors or two state dicts, got a {type(base).__name__} and a "
            f"{type(tuned).__name__}; use interpolate_checkpoints for files, RatioSweep for modules"
        )
    start, end = open_source(base, role="base"), open_source(tuned, role="tuned")
    matched = match(start, end, same_dtype=True)
    merged = [name for name in matched.names if start.is_merged(name)]
    decided = [per_tensor(point, merged, what="ratio") for point in points]
    made: dict[str, Sequence[Tensor]] = {}
    for name in matched.names:
        ends = start[name], end[name]
        if start.is_merged(name):
            made[name] = _points(*ends, [own[name] for own in decided], impl).unbind()
        else:
            made[name] = [ends[is_tuned(*at)].clone() for at in zip(points, decided, strict=True)]
    stands_for = {raw: matched.resolve(canonical_name(raw)) for raw in base}
    return [{raw: made[name][i] for raw, name in stands_for.items()} for i in range(len(points))]


def _points(base: Tensor, tuned: Tensor, ratios: Sequence[float], impl: str) -> Tensor:
    if (base.shape, base.dtype, base.device) != (tuned.shape, tuned.dtype, tuned.device):
        raise ValueError(
            f"base is {list(base.shape)} {base.dtype} on {base.device} but tuned {list(tuned.shape)} "
            f"{tuned.dtype} on {tuned.device}; make shape, dtype and device the same"
        )
    points = base.new_empty(len(ratios), base.numel())
    bases, tuneds = (torch.split(end.reshape(-1), _CHUNK) for end in (base, tuned))
    outs = zip(*(torch.split(point, _CHUNK) for point in points), strict=True)
    functional.interpolate(bases, tuneds, ratios, list(outs), impl=impl)
    return points.view(len(ratios), *base.shape)
