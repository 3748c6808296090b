"""What merging did over a run, by layer: lines for a few layers, heat maps for more."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fused_merge.io.sources import PathLike
from fused_merge.names import list_and_layer
from fused_merge.plots.heat_maps import Panel, draw_heat_maps
from fused_merge.plots.style import DPI, check_matplotlib, look, picture_path, style, write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Name of a tensor or of a layer -> statistic -> value.
Stats: TypeAlias = "Mapping[str, Mapping[str, float]]"

# What is told of the update is above what is told of tau.
_TITLES = {
    "cosine": "cosine of u and tau",
    "kept_u": "share of u that is kept",
    "lost_u": "share of kept u that is lost",
    "conflicts": "share of opposite signs",
    "kept_tau": "share of tau that is kept",
    "lost": "share of kept tau that is lost",
}
_ACROSS = 3
# More lines than that are not told apart.
_MOST_LINES = 6
# Above so many rows, all heat maps stand side by side.
_MANY = 40


def plot_merge_stats(
    history: Mapping[int, Stats] | Iterable[Mapping[str, Any]], path: PathLike | None = None
) -> Figure:
    """Draw what merging did over a run, for each layer and for each tensor outside the layers.

    Six panels show means over the tensors of a layer: cosine of u and tau, share of opposite signs, shares of u and of
    tau that are kept, and the shares of these that are lost: added, they changed no bit of a weight. Up to six layers
    are lines over the steps; more are heat maps of layers and steps. See `MergingAdamW.merge_stats`.

    Args:
        history: step -> what `merge_stats()` returned then, copied: `history[step] = dict(optimizer.merge_stats())`.
            Or `trainer.state.log_history` of a trainer with `MergeStatsCallback(trainer, per_layer=True)`.
        path: where to write the picture, as PNG or SVG by its suffix. The same history gives the same bytes.

    Returns:
        The figure, to be shown, changed or saved otherwise.

    Raises:
        ValueError: if `history` holds no statistics by layer, or one dictionary under two steps, which then is the last
            one's; or if `path` ends in neither `.png` nor `.svg`.
        TypeError: if a step is no number.
        ImportError: if matplotlib is missing.
        OSError: if `path` cannot be written to.

    Example:
        >>> import torch
        >>> import fused_merge as fm
        >>> layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        >>> model = torch.nn.ModuleDict({"layers": layers})
        >>> base = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        >>> delta = fm.ReferenceDelta.from_models(base, model)
        >>> optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, stats_every=1)
        >>> history = {}
        >>> for step in range(3):
        ...     layers(torch.ones(4)).sum().backward()
        ...     optimizer.step()
        ...     history[step] = dict(optimizer.merge_stats())
        >>> figure = fm.plot_merge_stats(history, "merging.svg")
        >>> figure.axes[0].get_title(loc="left")
        'cosine of u and tau'
    """
    file = None if path is None else picture_path(path)
    check_matplotlib("plot_merge_stats")
    steps = _by_layer(history)
    rows = _rows(steps.values())
    values = {
        key: np.array([[stats.get(row, {}).get(key, np.nan) for stats in steps.values()] for row in rows])
        for key in _TITLES
    }
    figure = _lines(rows, list(steps), values) if len(rows) <= _MOST_LINES else _maps(rows, list(steps), values)
    if file is not None:
        write_picture(figure, file)
    return figure


def _by_layer(history: Mapping[int, Stats] | Iterable[Mapping[str, Any]]) -> dict[int, dict[str, dict[str, float]]]:
    """Return step -> layer, or tensor outside the layers -> means of the statistics, in the order of the steps."""
    if isinstance(history, Mapping):
        way_out = "history[step] = dict(optimizer.merge_stats())"
        if odd := [step for step in history if not isinstance(step, Real)]:
            raise TypeError(f"a step of the history must be a number, got {odd[0]!r}; collect it as {way_out}")
        if len({id(stats) for stats in history.values()}) < len(history):
            raise ValueError(f"two steps of the history hold one dictionary, that of the last; copy it: {way_out}")
        steps: Mapping[int, Stats] = history
    else:
        way_out = "MergeStatsCallback(trainer, per_layer=True)"
        steps = _logged(history)
    if not any(steps.values()):
        raise ValueError(f"the history holds no statistics by layer; collect them with stats_every=n and {way_out}")
    return {step: _means(steps[step]) for step in sorted(steps)}


def _logged(log: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, dict[str, float]]]:
    """Return what `MergeStatsCallback` wrote for each layer: `merge/model.layers.3/lost`, and not `merge/lost`."""
    steps: defaultdict[int, defaultdict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for entry in log:
        for key, value in entry.items():
            if key.startswith("merge/") and key.count("/") > 1:
                layer, _, statistic = key.removeprefix("merge/").rpartition("/")
                steps[entry["step"]][layer][statistic] = value
    return {step: dict(layers) for step, layers in steps.items()}


def _means(stats: Stats) -> dict[str, dict[str, float]]:
    found: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, entry in stats.items():
        place = list_and_layer(name)
        for key, value in entry.items():
            found[f"{place[0]}.{place[1]}" if place else name][key].append(value)
    return {layer: {key: fmean(values) for key, values in entry.items()} for layer, entry in found.items()}


def _rows(steps: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return tensors outside the layers as they come, then the layers of each list by number."""
    names = list(dict.fromkeys(name for layers in steps for name in layers))
    places = {name: place for name in names if (place := list_and_layer(name)) is not None}
    lists = list(dict.fromkeys(stack for stack, _ in places.values()))
    inside = sorted(places, key=lambda name: (lists.index(places[name][0]), places[name][1]))
    return [name for name in names if name not in places] + inside


def _lines(rows: Sequence[str], steps: Sequence[int], values: Mapping[str, NDArray[np.float64]]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with style():
        figure = Figure(figsize=(12, 6.5), dpi=DPI, layout="constrained")
        for i, (key, title) in enumerate(_TITLES.items()):
            axes = figure.add_subplot(2, _ACROSS, i + 1)
            axes.set_title(title)
            axes.grid()
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
            for k, row in enumerate(rows):
                axes.plot(steps, values[key][k], label=row, markersize=4, markevery=0.1, **look(k))
        for axes in figure.axes[_ACROSS:]:
            axes.set_xlabel("step")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def _maps(rows: Sequence[str], steps: Sequence[int], values: Mapping[str, NDArray[np.float64]]) -> Figure:
    panels = [Panel(title, values[key], signed=key == "cosine") for key, title in _TITLES.items()]
    labels = [f"{step:g}" for step in steps]
    many = len(rows) > _MANY
    cell = ((2.0 if many else 3.2) / len(steps), 0.14 if many else 0.17)
    figure, drawn = draw_heat_maps(panels, rows, labels, cell=cell, across=len(panels) if many else _ACROSS)
    for axes in drawn:
        axes.set_xlabel("step", fontsize=9)
    return figure
