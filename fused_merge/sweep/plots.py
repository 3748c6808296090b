"""Pictures, which need matplotlib: pip install 'fused_merge[plots]'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fused_merge.sweep.pareto import pareto_front
from fused_merge.sweep.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X"
_SOFT = "#8b949e"
# Labels of different sweeps lie on different sides of their points: how far right and up, what is aligned there.
_SIDES = (((7, 5), "left"), ((-7, -12), "right"))


def draw_fronts(sweeps: Mapping[str, Results]) -> Figure:
    """Return a picture of the first two scores of sweeps by name: labeled points, and the front of each sweep.

    An axis whose score is better when it is lower runs backwards, so that up and right is better. Names and directions
    of the scores are those of the first sweep. Raises ImportError without matplotlib.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    main = next(iter(sweeps.values()))
    maximize = main.maximize[:2]
    hollow: dict[str, Any] = {"markerfacecolor": "white", "linestyle": "none", "alpha": 0.6, "zorder": 3}
    halo = [withStroke(linewidth=2.5, foreground="white")]
    label: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "path_effects": halo, "zorder": 2.5}
    # Names are the user's: a $ in them is no formula.
    style: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
        axes = figure.subplots()
        for i, (name, results) in enumerate(sweeps.items()):
            look: dict[str, Any] = {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)]}
            points = [(x, y) for x, y, *_ in results.points]
            front = pareto_front(points, maximize=maximize)
            axes.plot(*zip(*sorted(points[k] for k in front), strict=True), label=name, zorder=4, **look)
            if behind := [point for k, point in enumerate(points) if k not in front]:
                axes.plot(*zip(*behind, strict=True), **look, **hollow)
            shift, aligned = _SIDES[i % len(_SIDES)]
            for k, (scored, point) in enumerate(zip(results.finished, points, strict=True)):
                color = look["color"] if k in front else _SOFT
                axes.annotate(scored.label, point, shift, horizontalalignment=aligned, color=color, **label)
        for axis, name, more in zip((axes.xaxis, axes.yaxis), main.scores, maximize, strict=False):
            axis.set_label_text(name if more else f"{name} (axis reversed)")
            axis.set_inverted(not more)
        axes.set_title("Up and right is better; the lines are the fronts", loc="left", fontsize=12)
        axes.grid(color="#eaeef2")
        axes.set_axisbelow(True)
        if len(sweeps) > 1:
            axes.legend(frameon=False)
    return figure


def check_matplotlib() -> None:
    """Raise ImportError if matplotlib is missing; the sentence says what to install."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("pareto.png needs matplotlib: pip install 'fused_merge[plots]'") from error
