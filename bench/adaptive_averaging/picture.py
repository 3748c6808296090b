"""The picture: which third matters, what the search finds, and how much of it every seed shows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from averaging import UNIFORM, Point, adaptive, one_part
from experiment import PARTS, Setting
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator
from report import INK, SOFT, TAXES, Tax, spread

# Told apart by every kind of color vision (Okabe and Ito), and by their marks.
COLORS = ("#0072B2", "#D55E00", "#009E73")
MARKS = ("o", "s", "^")
Volumes = Mapping[str, Sequence[float]]  # family -> one for each seed
HALO = [withStroke(linewidth=2.5, foreground="white")]
TITLES = {"exact_match": "tasks answered exactly (share)", "perplexity": "perplexity of held-out text (axis reversed)"}


def draw(path: Path, setting: Setting, points: Sequence[Point], volumes: Mapping[str, Volumes]) -> None:
    """Draw what the thirds change, the fronts of the search, and the hypervolumes.

    Args:
        path: the PNG file.
        setting: families and ratios.
        points: of every seed.
        volumes: by the field of the tax, then by family: one hypervolume for each seed.
    """
    thirds = list(map(one_part, PARTS))
    searched = [adaptive(parts) for parts in setting.searched]
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14, 10), dpi=110, layout="constrained")
        axes = figure.subplots(2, 3, width_ratios=(1, 1.15, 0.5))
        for (left, right, narrow), tax in zip(axes, TAXES, strict=True):
            own = volumes[tax.field]
            _thirds(left, points, thirds, tax, own)
            _searched(right, points, searched, tax, own)
            _gains(narrow, {family: np.subtract(own[family], own[UNIFORM]) for family in searched})
            left.set_ylabel(f"change of {tax.name}{'' if tax.sign > 0 else ' (axis reversed)'}")
            left.set_xlabel("change of reward")
            right.set_ylabel(TITLES[tax.field])
            right.set_xlabel("reward (0 to 4; the axis widens to the right)")
            narrow.set_xlabel(f"reward x {tax.name}")
        ratios = ", ".join(f"{ratio:g}" for ratio in setting.mean_ratios)
        for axis, title in zip(
            axes[0],
            (
                "One third at a ratio (numbers), the others at 1:\nchange against the trained model of the same seed",
                f"Ratios found by the search\nmarks: mean ratios {ratios}, from the left",
                "Hypervolume beyond\none ratio for all",
            ),
            strict=True,
        ):
            axis.set_title(title, loc="left", fontsize=12, color=INK)
        seeds = len(setting.seeds)
        runs = "one seed" if seeds == 1 else f"means over {seeds} seeds, bars: standard deviation"
        figure.suptitle(
            f"Between SFT (ratio 0) and the preference-trained model (1): up and right is better ({runs})", color=INK
        )
        figure.savefig(path, metadata={"Software": None})


def _thirds(axis: Axes, points: Sequence[Point], families: Sequence[str], tax: Tax, volumes: Volumes) -> None:
    """What it changes in each seed to take one third back, or all of the network."""
    every = _curves(points, UNIFORM, tax)
    trained = every[1.0]
    shown = []
    for family, color, marker in zip((*families, UNIFORM), (*COLORS, SOFT), (*MARKS, "D"), strict=True):
        curves = {ratio: found - trained for ratio, found in (_curves(points, family, tax) | {1.0: trained}).items()}
        _line(axis, curves, color, marker, family, volumes)
        for ratio, found in curves.items():
            if family != UNIFORM and ratio < 1.0:
                shown.append(found.mean(axis=0))
                _note(axis, f"{ratio:g}", shown[-1], color, (6, 6), "left")
    axis.plot(0, 0, "*", color=INK, ms=15, zorder=6)
    _note(axis, "preference-trained", np.zeros(2), INK, (0, -16), "center")
    # The surroundings of the thirds, and room for the legend: most of the line back to SFT lies outside.
    low, high = np.min([*shown, (0, 0)], axis=0), np.max([*shown, (0, 0)], axis=0)
    width, height = np.maximum(high - low, 1e-3)
    axis.set_xlim(low[0] - 0.1 * width, high[0] + 0.15 * width)
    if tax.sign > 0:
        axis.set_ylim(low[1] - 0.55 * height, high[1] + 0.25 * height)
    else:
        axis.set_ylim(high[1] + 0.55 * height, low[1] - 0.25 * height)
    _finish(axis)


def _searched(axis: Axes, points: Sequence[Point], families: Sequence[str], tax: Tax, volumes: Volumes) -> None:
    """The fronts of the search, and of one ratio for all."""
    every = _curves(points, UNIFORM, tax)
    ends = {end: every[end] for end in (0.0, 1.0)}
    for family, color, marker in zip((UNIFORM, *families), (SOFT, *COLORS), ("D", *MARKS), strict=True):
        curves = dict(sorted((_curves(points, family, tax) | ends).items()))
        # Of one ratio for all the line is finer than that of the search.
        marked = set(_curves(points, families[0], tax))
        _line(axis, curves, color, marker, family, volumes, marked)
    for end, name, shift, align in ((0.0, "SFT", (10, 4), "left"), (1.0, "preference-trained", (-10, 0), "right")):
        at = ends[end].mean(axis=0)
        axis.plot(*at, "*", color=INK, ms=15, zorder=6)
        _note(axis, name, at, INK, shift, align)
    # The fronts are steep at the right: there the axis shows more.
    axis.set_xscale("function", functions=(lambda r: -np.log(4 - r), lambda x: 4 - np.exp(-x)))
    axis.xaxis.set_major_locator(FixedLocator([1, 1.5, 2, 2.5, 2.75, 3, 3.25, 3.5]))
    axis.yaxis.set_inverted(tax.sign < 0)
    _finish(axis)


def _finish(axis: Axes) -> None:
    axis.grid(color="#eaeef2")
    axis.set_axisbelow(True)
    axis.legend(loc="lower left", frameon=False, title="hypervolume", alignment="left")


def _curves(points: Sequence[Point], family: str, tax: Tax) -> dict[float, np.ndarray]:
    """(reward, tax) `[seeds, 2]` at each ratio of a family, by rising ratio."""
    own = sorted((p for p in points if p.family == family), key=lambda p: (p.ratio, p.seed))
    ratios = dict.fromkeys(p.ratio for p in own)
    return {ratio: np.array([(p.reward, tax.of(p)) for p in own if p.ratio == ratio]) for ratio in ratios}


def _line(
    axis: Axes,
    curves: Mapping[float, np.ndarray],
    color: str,
    marker: str,
    family: str,
    volumes: Volumes,
    marked: Collection[float] | None = None,
) -> None:
    """A family's means and their bars, with marks at some ratios or at all, and its hypervolume in the legend."""
    found = np.stack(list(curves.values()))  # [ratios, seeds, 2]
    mean = found.mean(axis=1).T
    places = [i for i, ratio in enumerate(curves) if marked is None or ratio in marked]
    if found.shape[1] > 1:
        right, up = found.std(axis=1, ddof=1)[places].T
        style = {"fmt": "none", "ecolor": color, "elinewidth": 0.8, "alpha": 0.45, "zorder": 3}
        axis.errorbar(*mean[:, places], xerr=right, yerr=up, **style)
    called = "one ratio for all" if family == UNIFORM else family
    digits = 2 if max(volumes[family]) < 10 else 1
    axis.plot(
        *mean,
        color=color,
        lw=2.2 if family == UNIFORM else 1.6,
        marker=marker,
        markevery=places,
        ms=5.5,
        label=f"{called}: {spread(volumes[family], digits)}",
        zorder=3.5 if family == UNIFORM else 4,
    )


def _note(axis: Axes, text: str, at: np.ndarray, color: str, shift: tuple[int, int], align: str) -> None:
    axis.annotate(
        text,
        at,
        shift,
        textcoords="offset points",
        fontsize=9,
        color=color,
        ha=align,
        va="center",
        path_effects=HALO,
        zorder=7,
    )


def _gains(axis: Axes, gains: Mapping[str, np.ndarray]) -> None:
    """A row for each family: every seed a point, the mean a bar."""
    for row, (found, color, marker) in enumerate(zip(gains.values(), COLORS, MARKS, strict=True)):
        axis.plot(found, [row] * len(found), marker, color=color, ms=7, alpha=0.65, ls="none")
        axis.plot([np.mean(found)] * 2, [row - 0.3, row + 0.3], color=color, lw=2.5)
    axis.axvline(0, color=SOFT, lw=1.2, zorder=1)
    axis.set_yticks(range(len(gains)), [family.removeprefix("adaptive, ") for family in gains])
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.invert_yaxis()
    axis.grid(axis="x", color="#eaeef2")
    axis.set_axisbelow(True)
