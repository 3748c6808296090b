"""Measurements of a reference delta: norms, real density, what top-p keeps, overlap with another delta.

Everything is read tensor by tensor and added up in fp64; the sums of a layer are those of its tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import torch
from torch import Tensor

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.eager.sparsify import sparsify_tau
from fused_merge.io.sources import SourceLike, TensorSource, open_source
from fused_merge.names import layer_of, some
from fused_merge.progress import progress_bar

# Elements converted to fp64 at once.
_CHUNK = 1 << 20


@dataclass
class _Sums:
    numel: float = 0
    squares: float = 0  # of tau
    nonzero: float = 0
    base: float = 0  # squares of the base
    top: float = 0  # elements that top-p keeps
    other: float = 0  # squares of the other delta
    dot: float = 0
    both: float = 0  # elements at which neither delta is zero
    agree: float = 0  # of these, those with equal signs

    def add(self, more: _Sums) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(more, field.name))

    def measurements(self) -> dict[str, float | None]:
        return {
            "numel": self.numel,
            "norm": math.sqrt(self.squares),
            "density": _quotient(self.nonzero, self.numel),
            "relative_norm": _quotient(math.sqrt(self.squares), math.sqrt(self.base)),
            "kept": _quotient(self.top, self.numel),
            "cosine": _quotient(self.dot, math.sqrt(self.squares) * math.sqrt(self.other)),
            "sign_agreement": _quotient(self.agree, self.both),
        }


def inspect_delta(
    delta: ReferenceDelta,
    *,
    base: SourceLike | None = None,
    other: ReferenceDelta | None = None,
    reserve_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Measure a reference delta.

    Args:
        delta: tau.
        base: theta_base, to relate norms to: a module, a state dict or a path.
        other: another delta of the same tensors.
        reserve_rate: p, in (0, 1], at which top-p by magnitude is tried.

    Returns:
        A dict for each tensor in the order of `delta`, then one for each layer, then one for everything. A layer is
        named by what comes before and with the first whole number in a name (`model.layers.7`), else by the module.
        A dict holds `scope` (`"tensor"`, `"layer"` or `"all"`), `name`, `numel`, `norm` (||tau||) and `density` (the
        share of elements that are not zero); with `base` also `relative_norm` (||tau|| / ||base||); with
        `reserve_rate` also `kept`, the share that top-p really keeps, tensor by tensor: more than p where magnitudes
        tie, less where tau has fewer elements than that; with `other` also `cosine` of the two and
        `sign_agreement`, the share of equal signs where neither is zero. A quotient by zero is None.

    Raises:
        ValueError: if `other` or `base` does not hold the same tensors, tau is not finite, or a rate is out of range.
    """
    if reserve_rate is not None and not 0.0 < reserve_rate <= 1.0:
        raise ValueError(f"reserve_rate must lie in (0, 1], got {reserve_rate}")
    weights = None if base is None else open_source(base, role="base")
    _check_same(delta, weights, other)
    layers: dict[str, _Sums] = {}
    tensors: dict[str, _Sums] = {}
    everything = _Sums()
    nbytes = {name: prod(delta.shape(name)) * delta.dtype(name).itemsize for name in delta.names}
    with progress_bar("inspecting the reference delta", sum(nbytes.values())) as advance:
        for name in delta.names:
            sums = _measure(
                name,
                delta.tensor(name),
                None if weights is None else weights[name],
                None if other is None else other.tensor(name),
                reserve_rate,
            )
            tensors[name] = sums
            layers.setdefault(layer_name(name), _Sums()).add(sums)
            everything.add(sums)
            advance(nbytes[name])
    asked = {"relative_norm": base is not None, "kept": reserve_rate is not None}
    asked |= dict.fromkeys(("cosine", "sign_agreement"), other is not None)
    return [
        {"scope": scope, "name": name}
        | {key: value for key, value in sums.measurements().items() if asked.get(key, True)}
        for scope, group in (("tensor", tensors), ("layer", layers), ("all", {"all": everything}))
        for name, sums in group.items()
    ]


def layer_name(name: str) -> str:
    """Return the name of a tensor's layer: its own up to the first number, `model.layers.7`, or that of its module."""
    place = layer_of(name)
    if place is None:
        return name.rpartition(".")[0] or name
    stack, number = place
    return f"{stack}.{number}" if stack else str(number)


def _check_same(delta: ReferenceDelta, base: TensorSource | None, other: ReferenceDelta | None) -> None:
    for what, source in (("the base", base), ("the other reference delta", other)):
        if source is None:
            continue
        names = set(source.names if isinstance(source, ReferenceDelta) else source)
        if missing := [name for name in delta.names if name not in names]:
            raise ValueError(f"{what} lacks {some(map(repr, missing))}; both must be of one model")
        for name in delta.names:
            if source.shape(name) != delta.shape(name):
                raise ValueError(
                    f"{name!r} is {list(delta.shape(name))} and in {what} {list(source.shape(name))}; "
                    "both must be of one model"
                )
    if other is not None and (extra := [name for name in other.names if name not in set(delta.names)]):
        raise ValueError(f"only the other reference delta holds {some(map(repr, extra))}; both must be of one model")


def _measure(name: str, tau: Tensor, base: Tensor | None, other: Tensor | None, rate: float | None) -> _Sums:
    sums = _Sums(numel=tau.numel())
    if rate is not None:
        kept = sparsify_tau(tau, name=name, method="magnitude", reserve_rate=rate, seed=0)
        sums.top = int(kept.count_nonzero())
    chunks = [_chunks(tensor) for tensor in (tau, base, other)]
    for i, part in enumerate(chunks[0]):
        x = part.double()
        sums.squares += float(x.dot(x))
        sums.nonzero += int(x.count_nonzero())
        if base is not None:
            b = chunks[1][i].to(x)
            sums.base += float(b.dot(b))
        if other is not None:
            y = chunks[2][i].double()
            both = (x != 0) & (y != 0)
            sums.other += float(y.dot(y))
            sums.dot += float(x.dot(y))
            sums.both += int(both.sum())
            sums.agree += int((both & ((x > 0) == (y > 0))).sum())
    return sums


def _chunks(tensor: Tensor | None) -> tuple[Tensor, ...]:
    return () if tensor is None else torch.split(tensor.reshape(-1), _CHUNK)


def _quotient(a: float, b: float) -> float | None:
    return a / b if b else None
