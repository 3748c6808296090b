"""What was measured of a reference delta, as heat maps: kinds of tensors by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fused_merge.names import layer_of
from fused_merge.plots.heat_maps import Panel, draw_heat_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A panel for each, titled, of the first quantity that was measured.
_PANELS = (
    {"relative_norm": "norm of tau / norm of base", "norm": "norm of tau"},
    {"kept": "share that top-p keeps", "density": "share that is not zero"},
    {"cosine": "cosine with the other"},
    {"sign_agreement": "share of equal signs"},
)
_OUTSIDE = "–"
# Up to so many columns all panels stand side by side, with cells that have room for a number.
_FEW = 8


class _Grid(NamedTuple):
    rows: list[str]
    columns: list[str]
    cells: dict[str, tuple[int, int]]  # of every tensor
    counted: str  # what the columns are
    groups: list[int]  # the columns that begin a list of layers, or are outside of all


def draw_inspection(entries: Sequence[Mapping[str, Any]]) -> Figure:
    """Return a picture of what `inspect_delta` returned.

    Rows are kinds of tensors and columns are layers; tensors outside the layers are in the first column. The experts of
    a layer share a row, which shows their mean. Raises ValueError if no tensor is in a layer.
    """
    tensors = {entry["name"]: entry for entry in entries if entry["scope"] == "tensor"}
    check_layers(tensors)
    grid = _grid(tensors)
    panels = []
    for titles in _PANELS:
        if (key := next((key for key in titles if key in entries[0]), None)) is not None:
            values = _values(grid, {name: entry[key] for name, entry in tensors.items()})
            panels.append(Panel(titles[key], values, signed=key == "cosine"))
    few = len(grid.columns) <= _FEW
    cell = (0.65 if few else 7 / max(len(grid.columns), 24), 0.25)
    across = len(panels) if few else 2
    figure, drawn = draw_heat_maps(panels, grid.rows, grid.columns, cell=cell, across=across, groups=grid.groups)
    for axes in drawn:
        axes.set_xlabel(grid.counted, fontsize=9)
    return figure


def check_layers(names: Iterable[str]) -> None:
    """Raise ValueError if no tensor is in a layer, which leaves nothing to draw."""
    if not any(map(layer_of, names)):
        raise ValueError(
            "no tensor is in a layer, as 'model.layers.0.mlp.up_proj.weight' is by its name; leave the picture out"
        )


def _grid(names: Iterable[str]) -> _Grid:
    places = {name: layer_of(name) for name in names}
    inside = {name: place for name, place in places.items() if place is not None}
    lists = list(dict.fromkeys(stack for stack, _ in inside.values()))
    layers = sorted(set(inside.values()), key=lambda place: (lists.index(place[0]), place[1]))
    outside = len(inside) < len(places)
    columns: dict[tuple[str, int] | None, int] = {None: 0}
    columns.update((place, i) for i, place in enumerate(layers, start=outside))
    kinds = {name: _kind(name, place) for name, place in places.items()}
    rows = list(dict.fromkeys([kinds[name] for name in inside] + list(kinds.values())))
    starts = [outside + [stack for stack, _ in layers].index(stack) for stack in lists]
    return _Grid(
        rows,
        [_OUTSIDE] * outside + [str(number) for _, number in layers],
        {name: (rows.index(kinds[name]), columns[place]) for name, place in places.items()},
        f"layer of {' | '.join(lists)}".removesuffix(" of ") + f"; {_OUTSIDE}: outside the layers" * outside,
        [0] * outside + starts,
    )


def _kind(name: str, place: tuple[str, int] | None) -> str:
    """Return what is left of a name without its layer, `.weight` and the numbers of experts."""
    if place is None:
        return name.removesuffix(".weight")
    stack = place[0]
    rest = name.split(".")[stack.count(".") + 2 if stack else 1 :]
    return ".".join("*" if part.isdecimal() else part for part in rest).removesuffix(".weight") or stack


def _values(grid: _Grid, quantity: Mapping[str, float | None]) -> NDArray[np.float64]:
    """Return the mean over the tensors of each cell, NaN where there is none."""
    found = defaultdict(list)
    for name, value in quantity.items():
        if value is not None:
            found[grid.cells[name]].append(value)
    values = np.full((len(grid.rows), len(grid.columns)), np.nan)
    for cell, each in found.items():
        values[cell] = fmean(each)
    return values
