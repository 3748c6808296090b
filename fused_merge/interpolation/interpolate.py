"""Tensors and state dicts at many ratios of the path between two models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from fused_merge import functional
from fused_merge.io.match import match
from fused_merge.io.options import OutputOptions
from fused_merge.io.sources import open_source
from fused_merge.names import canonical_name
from fused_merge.options import documented, resolve
from fused_merge.per_tensor import PerTensor, check_ratios, is_tuned, per_tensor

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Elements handed over at once: temporaries stay small whatever the tensor.
_CHUNK = 1 << 20


@overload
def interpolate(base: Tensor, tuned: Tensor, ratios: Sequence[float], *, impl: str = "auto") -> Tensor: ...


@overload
def interpolate(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    ratios: Sequence[PerTensor],
    *,
    impl: str = "auto",
    **options: Unpack[OutputOptions],
) -> list[dict[str, Tensor]]: ...


@documented(OutputOptions)
def interpolate(
    base: Tensor | Mapping[str, Tensor],
    tuned: Tensor | Mapping[str, Tensor],
    ratios: Sequence[PerTensor],
    *,
    impl: str = "auto",
    **options: Unpack[OutputOptions],
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
        {options}
            These are for state dicts.

    Returns:
        One tensor `[R, *shape]`, or a list of R dicts under the names of `base`, where tied names share a tensor and
        integer tensors are copies of `tuned`'s (`base`'s at r = 0). What only one state dict holds and is copied, and
        a head that only `tuned` has, follow under their own names. Rows beyond a common vocabulary are those of
        `tuned`, whose number they have.

    Raises:
        ValueError: for a ratio that is not finite, or tensors that do not match; the sentence names them.
        TypeError: if the two are not both tensors or both mappings.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> base, tuned = torch.tensor([0.0, 4.0]), torch.tensor([1.0, 2.0])
        >>> fm.interpolate(base, tuned, [0.0, 0.5, 1.5])
        tensor([[0.0000, 4.0000],
                [0.5000, 3.0000],
                [1.5000, 1.0000]])
        >>> (point,) = fm.interpolate({"w": base}, {"w": tuned}, [0.25])
        >>> point
        {'w': tensor([0.2500, 3.5000])}
    """
    points, given = check_ratios(ratios), resolve(options, OutputOptions)
    if isinstance(base, Tensor) and isinstance(tuned, Tensor):
        if not all(isinstance(point, float) for point in points):
            raise TypeError("two tensors have no names, so their ratios must be numbers; pass state dicts")
        return _points(base.detach(), tuned.detach(), points, impl)  # type: ignore[arg-type]
    if not (isinstance(base, Mapping) and isinstance(tuned, Mapping)):
        raise TypeError(
            f"base and tuned must be two tensors or two state dicts, got a {type(base).__name__} and a "
            f"{type(tuned).__name__}; use interpolate_checkpoints for files, RatioSweep for modules"
        )
    matched = match(open_source(base, role="base"), open_source(tuned, role="tuned"), same_dtype=True, **given)
    start, end = matched.first, matched.second
    merged = [name for name, (own, _) in matched.pairs.items() if start.is_merged(own)]
    decided = [per_tensor(point, merged, what="ratio") for point in points]
    made: dict[str, Sequence[Tensor]] = {}
    for name, names in matched.pairs.items():
        ends = start[names[0]], end[names[1]]
        if start.is_merged(names[0]):
            made[name] = _points_of_rows(*ends, [own[name] for own in decided], impl)
        else:
            made[name] = [ends[is_tuned(*at)].clone() for at in zip(points, decided, strict=True)]
    for source, only in zip((start, end), matched.only, strict=True):
        for name in only if given["unmatched"] == "copy" else ():
            made[name] = [source[name].clone() for _ in points]
    stands_for = {raw: matched.resolve(canonical_name(raw)) for raw in base}
    stands_for = {raw: name for raw, name in stands_for.items() if name in made}
    further = {*matched.untied, *matched.only[1]} & made.keys() - set(stands_for.values())
    stands_for |= {name: name for name in made if name in further}
    return [{raw: made[name][i] for raw, name in stands_for.items()} for i in range(len(points))]


def _points_of_rows(base: Tensor, tuned: Tensor, ratios: Sequence[float], impl: str) -> Sequence[Tensor]:
    """Return the points of two tensors that may differ in their rows, which are then those of `tuned`."""
    if base.shape == tuned.shape:
        return _points(base, tuned, ratios, impl).unbind()
    rows = min(len(base), len(tuned))
    return [torch.cat([point, tuned[rows:]]) for point in _points(base[:rows], tuned[:rows], ratios, impl)]


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
