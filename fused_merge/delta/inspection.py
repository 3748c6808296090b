"""Measurements of a reference delta: norms, real density, what top-p keeps, overlap with another delta.

Everything is read tensor by tensor and added up in fp64; the sums of a layer are those of its tensors.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.functional import backend
from fused_merge.functional.sparsify import sparsify
from fused_merge.io.match import has_first_rows, named_as
from fused_merge.io.sources import PathLike, SourceLike, open_source, whole_box
from fused_merge.names import layer_of, some
from fused_merge.plots.inspection import check_layers, draw_inspection
from fused_merge.plots.style import picture_path, write_picture
from fused_merge.progress import progress_bar

# Elements converted to fp64 at once.
_CHUNK = 1 << 20


def inspect_delta(
    delta: ReferenceDelta,
    *,
    base: SourceLike | None = None,
    other: ReferenceDelta | None = None,
    reserve_rate: float | None = None,
    plot: PathLike | None = None,
) -> list[dict[str, Any]]:
    """Measure a reference delta.

    Args:
        delta: tau.
        base: theta_base, to relate norms to: a module, a state dict or a path.
        other: another delta of the same tensors.
        reserve_rate: p, in (0, 1], at which top-p by magnitude is tried.
        plot: file to draw a picture to, as PNG or SVG by its suffix: heat maps of the norm (with `base` the relative
            one), the density (with `reserve_rate` what is kept), and with `other` cosine and signs. Rows are kinds of
            tensors, columns are layers; tensors outside the layers are in the first column.

    Returns:
        A dict for each tensor in the order of `delta`, then one for each layer, then one for everything. A layer is
        named by what comes before and with the first whole number in a name (`model.layers.7`), else by the module.
        A dict holds `scope` (`"tensor"`, `"layer"` or `"all"`), `name`, `numel`, `norm` (||tau||) and `density` (the
        share of elements that are not zero); with `base` also `relative_norm` (||tau|| / ||base||); with
        `reserve_rate` also `kept`, the share that top-p really keeps, tensor by tensor: more than p where magnitudes
        tie, less where tau has fewer elements than that; with `other` also `cosine` of the two and
        `sign_agreement`, the share of equal signs where neither is zero. A quotient by zero is None.

    Raises:
        ValueError: if `other` or `base` does not hold the same tensors, tau is not finite, a rate is out of range,
            or there is a picture to draw and no tensor is in a layer.
        ImportError: if there is a picture to draw and matplotlib is missing.
        OSError: if a file cannot be read or written.
    """
    if reserve_rate is not None and not 0.0 < reserve_rate <= 1.0:
        raise ValueError(f"reserve_rate must lie in (0, 1], got {reserve_rate}")
    picture = None if plot is None else picture_path(plot)
    if picture is not None:
        check_layers(delta.names)
    weights = None if base is None else named_as(open_source(base, role="base"), delta.names)
    if weights is not None:
        _check_same(delta, "the base", {name: weights.shape(name) for name in weights})
    if other is not None:
        _check_same(delta, "the other reference delta", {name: other.shape(name) for name in other.names})
        if extra := some(map(repr, sorted(set(other.names) - set(delta.names)))):
            raise ValueError(f"only the other reference delta holds {extra}; both must be of one model")
    scopes: dict[str, dict[str, defaultdict[str, float]]] = {"tensor": {}, "layer": {}, "all": {}}
    scopes["all"]["all"] = defaultdict(int)
    nbytes = {name: delta.shape(name).numel() * delta.dtype(name).itemsize for name in delta.names}
    work = backend.work([delta.shape(name).numel() for name in delta.names])
    with progress_bar("inspecting the reference delta", sum(nbytes.values())) as advance:
        for name in delta.names:
            # Of a larger vocabulary the rows that tau has.
            its_base = None if weights is None else weights.box(name, whole_box(delta.shape(name)))
            its_other = None if other is None else other.tensor(name)
            sums = _measure(name, delta.tensor(name), its_base, its_other, reserve_rate, work)
            for scope, group in (("tensor", name), ("layer", layer_name(name)), ("all", "all")):
                total = scopes[scope].setdefault(group, defaultdict(int))
                for key, value in sums.items():
                    total[key] += value
            advance(nbytes[name])
    entries = [
        {"scope": scope, "name": name} | _quantities(sums) for scope in scopes for name, sums in scopes[scope].items()
    ]
    if picture is not None:
        write_picture(draw_inspection(entries), picture)
    return entries


def layer_name(name: str) -> str:
    """Return the name of a tensor's layer: its own up to the first number, `model.layers.7`, or that of its module."""
    place = layer_of(name)
    if place is None:
        return name.rpartition(".")[0] or name
    return ".".join(map(str, place)).removeprefix(".")


def _check_same(delta: ReferenceDelta, what: str, shapes: Mapping[str, torch.Size]) -> None:
    if missing := [name for name in delta.names if name not in shapes]:
        raise ValueError(f"{what} lacks {some(map(repr, missing))}; both must be of one model")
    for name in delta.names:
        if shapes[name] != delta.shape(name) and not has_first_rows(delta.shape(name), shapes[name]):
            raise ValueError(
                f"{name!r} is {list(delta.shape(name))} and in {what} {list(shapes[name])}; both must be of one model"
            )


def _measure(
    name: str, tau: Tensor, base: Tensor | None, other: Tensor | None, rate: float | None, work: int
) -> dict[str, float]:
    """Return what can be added up over tensors, all of which together are that much `backend.work`.

    Squares are of norms, and `both` is where neither delta is zero.
    """
    sums: defaultdict[str, float] = defaultdict(int, numel=tau.numel())
    if rate is not None:
        kept = sparsify(tau, name=name, method="magnitude", reserve_rate=rate, seed=0, work=work)
        sums["top"] = kept.values.numel()
    chunks = [() if tensor is None else torch.split(tensor.reshape(-1), _CHUNK) for tensor in (tau, base, other)]
    for i, chunk in enumerate(chunks[0]):
        x = chunk.double()
        sums["tau_squares"] += float(x.dot(x))
        sums["nonzero"] += int(x.count_nonzero())
        if base is not None:
            b = chunks[1][i].to(x)
            sums["base_squares"] += float(b.dot(b))
        if other is not None:
            y = chunks[2][i].double()
            both = (x != 0) & (y != 0)
            sums["other_squares"] += float(y.dot(y))
            sums["dot"] += float(x.dot(y))
            sums["both"] += int(both.sum())
            sums["agree"] += int((both & ((x > 0) == (y > 0))).sum())
    return sums


def _quantities(sums: Mapping[str, float]) -> dict[str, float | None]:
    """Return what a report tells of one tensor or of all, from the sums that there are."""
    norm = math.sqrt(sums["tau_squares"])
    report = {"numel": sums["numel"], "norm": norm, "density": _quotient(sums["nonzero"], sums["numel"])}
    if "base_squares" in sums:
        report["relative_norm"] = _quotient(norm, math.sqrt(sums["base_squares"]))
    if "top" in sums:
        report["kept"] = _quotient(sums["top"], sums["numel"])
    if "other_squares" in sums:
        report["cosine"] = _quotient(sums["dot"], norm * math.sqrt(sums["other_squares"]))
        report["sign_agreement"] = _quotient(sums["agree"], sums["both"])
    return report


def _quotient(a: float, b: float) -> float | None:
    return a / b if b else None
