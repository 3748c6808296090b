"""Pictures, which need matplotlib: pip install 'fused_merge[plots]'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fused_merge.sweep.pareto import pareto_front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vP*X"
_SOFT = "#8b949e"
# Labels of different sweeps lie on different sides of their points: how far right, how far up, what is aligned there.
_SIDES = ((7, 5, "left"), (-7, -12, "right"))


class Mark(NamedTuple):
    """A labeled point of a picture."""

    label: str
    x: float
    y: float


def draw_fronts(
    path: Path, sweeps: Mapping[str, Sequence[Mark]], scores: tuple[str, str], *, maximize: tuple[bool, bool]
) -> None:
    """Write the picture of `fronts` to a PNG file; the same input makes the same bytes."""
    # The name of the program has its version in it.
    fronts(sweeps, scores, maximize=maximize).savefig(path, format="png", metadata={"Software": None})


def fronts(sweeps: Mapping[str, Sequence[Mark]], scores: tuple[str, str], *, maximize: tuple[bool, bool]) -> Figure:
    """Return a picture of several sweeps over two scores: labeled points, and the front of each sweep.

    An axis whose score is better when it is lower runs backwards, so that up and right is better.

    Args:
        sweeps: name -> points.
        scores: names of the two axes.
        maximize: whether more is better, for each axis.

    Raises:
        ImportError: without matplotlib.
    """
    check_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    # Names are the user's: a $ in them is no formula.
    style: Any = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9, 6), dpi=130, layout="constrained")
        axes = figure.subplots()
        for i, (name, marks) in enumerate(sweeps.items()):
            look: dict[str, Any] = {"color": f"C{i % 10}", "marker": _MARKERS[i % len(_MARKERS)]}
            front = pareto_front([(mark.x, mark.y) for mark in marks], maximize=maximize)
            path = sorted((marks[k].x, marks[k].y) for k in front)
            axes.plot(*zip(*path, strict=True), label=name, zorder=4, **look)
            behind = [(mark.x, mark.y) for k, mark in enumerate(marks) if k not in front]
            if behind:
                hollow: dict[str, Any] = {"markerfacecolor": "white", "linestyle": "none", "alpha": 0.6}
                axes.plot(*zip(*behind, strict=True), zorder=3, **look, **hollow)
            right, up, aligned = _SIDES[i % len(_SIDES)]
            for k, mark in enumerate(marks):
                axes.annotate(
                    mark.label,
                    (mark.x, mark.y),
                    (right, up),
                    textcoords="offset points",
                    horizontalalignment=aligned,
                    fontsize=9,
                    color=look["color"] if k in front else _SOFT,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],
                    zorder=2.5,
                )
        for axis, name, more in zip((axes.xaxis, axes.yaxis), scores, maximize, strict=True):
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
