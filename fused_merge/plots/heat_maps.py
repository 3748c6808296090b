"""Heat maps of several quantities over the same rows and columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fused_merge.plots.style import COLOR_MAP, DPI, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMALL = 8
# Inches: of a letter, of a column that has room for a number, of the bar of colors, and what a panel needs beside and
# above its cells.
_LETTER, _NUMBER, _BAR = 0.075, 0.6, 0.14
_BESIDE, _ABOVE = 0.9, 0.7
_NARROWEST = 1.8


class Panel(NamedTuple):
    """One quantity.

    Attributes:
        title: what it is.
        values: one for each row and column, NaN where there is none.
        signed: whether zero is in the middle of the colors.
    """

    title: str
    values: NDArray[np.float64]
    signed: bool = False


def draw_heat_maps(
    panels: Sequence[Panel],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    cell: tuple[float, float],
    across: int,
    groups: Sequence[int] = (0,),
) -> tuple[Figure, list[Axes]]:
    """Draw panels side by side, so many `across`, and the rest below them.

    Every row is labeled, and as many columns as there is room for. Lighter is more; what has no number is hatched. In
    cells that are wide enough stand their numbers.

    Args:
        panels: at least one.
        rows: their labels, from the top.
        columns: their labels, from the left.
        cell: width and height of a cell in inches.
        across: number of panels side by side.
        groups: the columns that begin a group, 0 first; labels are counted from there, and a line is in front.

    Returns:
        The figure, and the axes of each panel.
    """
    from matplotlib.figure import Figure

    across = min(across, len(panels))
    down = math.ceil(len(panels) / across)
    width, height = max(_NARROWEST, cell[0] * len(columns)), cell[1] * len(rows)
    beside = _LETTER * max(map(len, rows))
    every = _interval((1 + max(map(len, columns))) * _LETTER * len(columns) / width)
    labeled = [i for start, end in pairwise([*groups, len(columns)]) for i in range(start, end, every)]
    with style():
        size = (beside + across * (width + _BESIDE), down * (height + _ABOVE) + 0.3)
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        drawn = [figure.add_subplot(down, across, i + 1) for i in range(len(panels))]
        for i, (axes, panel) in enumerate(zip(drawn, panels, strict=True)):
            _draw(axes, panel, numbers=width / len(columns) >= _NUMBER)
            low, high = axes.images[0].get_clim()
            bar: Any = figure.colorbar(
                axes.images[0], ax=axes, pad=0.02, fraction=1.3 * _BAR / width, aspect=height / _BAR
            )
            if low == high:
                bar.set_ticks([low])
            bar.outline.set_visible(False)
            bar.ax.tick_params(labelsize=_SMALL, length=2)
            axes.set_yticks(range(len(rows)), rows if i % across == 0 else [""] * len(rows))
            axes.set_xticks(labeled, [columns[i] for i in labeled])
            for start in groups[1:]:
                axes.axvline(start - 0.5, color="white", linewidth=3)
    return figure, drawn


def _interval(least: float) -> int:
    """Return the first of 1, 2, 5, 10, 20, 50, ... that is not below a number."""
    return next(int(n * 10.0**power) for power in count() for n in (1, 2, 5) if n * 10.0**power >= least)


def _draw(axes: Axes, panel: Panel, *, numbers: bool) -> None:
    known = panel.values[np.isfinite(panel.values)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
    if panel.signed:
        high = max(-low, high)
        low = -high
    cells = np.ma.masked_invalid(panel.values)
    image = axes.imshow(cells, cmap=COLOR_MAP, vmin=low, vmax=high, aspect="auto", interpolation="none")
    axes.patch.set(hatch="//////", edgecolor="#d0d7de", linewidth=0)
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=_SMALL, length=2)
    axes.set_title(panel.title, fontsize=10)
    if numbers:
        # The lightness of the colors that are behind the numbers.
        behind = np.asarray(image.to_rgba(cells))[..., :3] @ (0.299, 0.587, 0.114)
        for (row, column), value in np.ndenumerate(panel.values):
            if np.isfinite(value):
                ink = "white" if behind[row, column] < 0.5 else "black"
                axes.text(column, row, f"{value:.2g}", ha="center", va="center", color=ink, fontsize=_SMALL)
