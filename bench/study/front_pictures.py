"""The picture of an algorithm: AdamW's path, its rivals as circles, merging while training as squares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from comparisons import UNIFORM, Unit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from plan import ADAMW, CONTENDERS
from report import INK, TAXES, Tax

from fused_merge.plots.style import DPI, SOFT, look, style, write_picture

LINE, MERGING = look(0)["color"], look(1)["color"]
TITLES = {"exact_match": "exact match", "perplexity": "perplexity (axis reversed)"}
_RIVALS = [name for name, contender in CONTENDERS.items() if contender.group == "rival" and name != ADAMW]
_MERGING = [name for name, contender in CONTENDERS.items() if contender.group == "merging"]
# The same in all pictures.
LABELS = dict(zip(_RIVALS, map(str, count(1)), strict=False)) | dict(zip(_MERGING, ascii_lowercase, strict=False))
# Where a label may stand, in points from its mark: the nearest first.
SHIFTS = [
    (round(radius * np.cos(angle)), round(radius * np.sin(angle)))
    for radius in (11, 17, 24, 32, 42)
    for angle in np.linspace(0.25 * np.pi, 2.25 * np.pi, 12, endpoint=False)
]
ROOM = 10.5  # points between two labels, or a label and a mark


def draw(path: Path, title: str, units: Sequence[Unit]) -> None:
    """Draw reward to the right and what is kept upwards, means over units with thin bars for standard deviations."""
    labels = {name: label for name, label in LABELS.items() if any(name in unit.models for unit in units)}
    with style():
        figure = Figure(figsize=(13, 8), dpi=DPI, layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, tax in zip(axes, TAXES, strict=True):
            _panel(axis, units, labels, tax)
        figure.legend(handles=_legend(labels), loc="outside lower center", ncols=5, fontsize=9)
        runs = "one run" if len(units) == 1 else f"means over {len(units)} runs, bars: standard deviation"
        figure.suptitle(f"{title}: what a model earns and what it keeps; up and right is better ({runs})", color=INK)
        figure.draw_without_rendering()
        # Only now it is known where the marks lie on the page.
        figure.set_layout_engine("none")
        for axis, tax in zip(axes, TAXES, strict=True):
            _name(axis, units, labels, tax)
    write_picture(figure, path)


def _place(units: Sequence[Unit], name: str, tax: Tax) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of (reward, tax) of a contender's models."""
    points = [unit.models[name] for unit in units if name in unit.models]
    found = np.array([(point.reward, tax.of(point)) for point in points])
    return found.mean(axis=0), found.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(2)


def _path(units: Sequence[Unit], tax: Tax) -> np.ndarray:
    """Means of the start, the averages by rising ratio, and AdamW's model `[points, 2]`."""
    ratios = sorted({point.setting for unit in units for point in unit.averages.get(UNIFORM, ())})
    groups = [[unit.start for unit in units]]
    groups += [[p for unit in units for p in unit.averages[UNIFORM] if p.setting == ratio] for ratio in ratios]
    groups.append([unit.models[ADAMW] for unit in units])
    return np.array([np.mean([(p.reward, tax.of(p)) for p in group], axis=0) for group in groups])


def _panel(axis: Axes, units: Sequence[Unit], labels: dict[str, str], tax: Tax) -> None:
    line = _path(units, tax)
    axis.plot(*line.T, color=LINE, marker=".", lw=1.8, zorder=4)
    axis.plot(*line[0], "*", color=INK, ms=15, zorder=6)
    for name in [ADAMW, *labels]:
        at, sd = _place(units, name, tax)
        color, mark = _look(name)
        if sd.any():
            axis.errorbar(*at, *sd[::-1], fmt="none", ecolor=color, elinewidth=0.6, alpha=0.5, zorder=3)
        axis.plot(*at, ls="none", zorder=5, **mark)
    axis.margins(0.08)
    if tax.sign < 0:
        # A model that has collapsed would otherwise leave no room to the others.
        axis.set_yscale("log")
        low, high = sorted(axis.get_ylim())
        axis.yaxis.set_major_locator(MaxNLocator(7) if high < 4 * low else LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_inverted(True)
    axis.set_xlabel("reward")
    axis.set_ylabel(TITLES[tax.field])
    axis.grid()


def _look(name: str) -> tuple[str, dict[str, object]]:
    """Color and mark of a contender's group."""
    if name == ADAMW:
        return LINE, {"marker": "o", "color": LINE, "ms": 9}
    if CONTENDERS[name].group == "rival":
        return SOFT, {"marker": "o", "color": SOFT, "mfc": "white", "ms": 5, "mew": 1.4}
    return MERGING, {"marker": "s", "color": MERGING, "ms": 5.5}


def _name(axis: Axes, units: Sequence[Unit], labels: dict[str, str], tax: Tax) -> None:
    """Put every label beside its mark, at the nearest place where nothing stands yet."""
    scale = 72 / axis.figure.dpi
    places = {name: _place(units, name, tax)[0] for name in labels}
    pages = {name: axis.transData.transform(at) * scale for name, at in places.items()}
    corners = axis.transData.transform(_path(units, tax)) * scale
    line = np.concatenate([np.linspace(*ends, 40) for ends in pairwise(corners)])
    taken = [*pages.values(), corners[0], corners[-1]]
    for name, label in labels.items():
        spots = [pages[name] + shift for shift in SHIFTS]
        # A label may come nearer to the path than to a mark.
        clear = [min(_distance(spot, np.array(taken)), _distance(spot, line) + 0.4 * ROOM) for spot in spots]
        best = next((i for i, distance in enumerate(clear) if distance >= ROOM), int(np.argmax(clear)))
        taken.append(spots[best])
        axis.annotate(
            label,
            places[name],
            SHIFTS[best],
            textcoords="offset points",
            fontsize=9,
            ha="center",
            va="center",
            color=INK,
            fontweight="normal" if CONTENDERS[name].group == "rival" else "bold",
            arrowprops={"arrowstyle": "-", "color": SOFT, "lw": 0.6, "shrinkA": 3, "shrinkB": 2},
            path_effects=[withStroke(linewidth=2, foreground="white")],
            zorder=7,
        )


def _distance(spot: np.ndarray, others: np.ndarray) -> float:
    return float(np.linalg.norm(others - spot, axis=1).min())


def _legend(labels: dict[str, str]) -> list[Line2D]:
    handles = [
        Line2D([], [], ls="none", marker="*", color=INK, ms=12, label="start"),
        Line2D([], [], color=LINE, marker=".", label="the path to AdamW's model"),
        Line2D([], [], ls="none", label=ADAMW, **_look(ADAMW)[1]),
    ]
    return handles + [
        Line2D([], [], ls="none", label=f"{label}  {name}", **_look(name)[1]) for name, label in labels.items()
    ]
