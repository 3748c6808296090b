"""The picture of sweeps: two scores, and their fronts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fused_merge.plots.style import DPI, SOFT, look, style
from fused_merge.sweep.pareto import pareto_front
from fused_merge.sweep.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Labels of different sweeps lie on different sides of their points: how far right and up, what is aligned there.
_SIDES = (((7, 5), "left"), ((-7, -12), "right"))


def draw_fronts(sweeps: Mapping[str, Results]) -> Figure:
    """Return a picture of the first two scores of sweeps by name: labeled points, and the front of each sweep.

    An axis whose score is better when it is lower runs backwards, so that up and right is better. Names and directions
    of the scores are those of the first sweep.
    """
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    main = next(iter(sweeps.values()))
    maximize = main.maximize[:2]
    hollow: dict[str, Any] = {"markerfacecolor": "white", "linestyle": "none", "alpha": 0.6, "zorder": 3}
    halo = [withStroke(linewidth=2.5, foreground="white")]
    label: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "path_effects": halo, "zorder": 2.5}
    with style():
        figure = Figure(figsize=(9, 6), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for i, (name, results) in enumerate(sweeps.items()):
            own = look(i)
            points = [(x, y) for x, y, *_ in results.points]
            front = pareto_front(points, maximize=maximize)
            axes.plot(*zip(*sorted(points[k] for k in front), strict=True), label=name, zorder=4, **own)
            if behind := [point for k, point in enumerate(points) if k not in front]:
                axes.plot(*zip(*behind, strict=True), **(own | hollow))
            shift, aligned = _SIDES[i % len(_SIDES)]
            for k, (scored, point) in enumerate(zip(results.finished, points, strict=True)):
                color = own["color"] if k in front else SOFT
                axes.annotate(scored.label, point, shift, horizontalalignment=aligned, color=color, **label)
        for axis, name, more in zip((axes.xaxis, axes.yaxis), main.scores, maximize, strict=False):
            axis.set_label_text(name if more else f"{name} (axis reversed)")
            axis.set_inverted(not more)
        axes.set_title("Up and right is better; the lines are the fronts")
        axes.grid()
        if len(sweeps) > 1:
            axes.legend()
    return figure
