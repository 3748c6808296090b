"""From points to a table, sentences and a picture. Nothing here knows what the outcome should be."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator
from settings import ADDED_TAU, FROM_FULL, MAIN, RATIOS, SFT_SHARE, Setting

from fused_merge import pareto_front

PACKAGES = ("fused_merge", "torch", "transformers", "trl", "datasets", "tokenizers")


@dataclass(frozen=True)
class Point:
    """One measured model.

    `role` says what it is in the comparison, `run` which training it belongs to, `value` the ratio of an
    interpolation or the c of an added c*tau; `along_tau` is how far it lies from the start in units of tau.
    """

    seed: int
    order: int | None
    start: str
    role: str
    run: str
    value: float | None
    reward: float
    exact_match: float
    perplexity: float
    along_tau: float
    cosine: float

    @property
    def label(self) -> str:
        """Its name in tables."""
        if self.role == "interpolation":
            return f"{self.start} to {self.run}, ratio {self.value}"
        if self.role in ("tau afterwards", "pre-check"):
            return f"{self.run} + {self.value} tau"
        return self.run


def write_report(out: Path, setting: Setting, points: Sequence[Point]) -> list[Path]:
    """Write table.json, table.md and pareto.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / name for name in ("table.json", "table.md", "pareto.png")]
    content = {
        "setting": asdict(setting),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "summary": summary(points),
        "points": [asdict(point) for point in points],
    }
    files[0].write_text(json.dumps(content, indent=1) + "\n")
    files[1].write_text(markdown(setting, points))
    draw(files[2], points)
    return files


# ---------------------------------------------------------------- comparisons


@dataclass(frozen=True)
class Tax:
    """One way in which the tax is measured; `sign` is +1 where more is better, -1 where less is."""

    field: str
    name: str
    digits: int
    sign: int
    title: str

    def of(self, point: Point) -> float:
        return float(getattr(point, self.field))


TAXES = (
    Tax("exact_match", "exact match", 3, +1, "Tasks answered exactly (share)"),
    Tax("perplexity", "perplexity", 2, -1, "Perplexity of held-out base text, per character (axis reversed)"),
)


def front(points: Iterable[Point], tax: Tax) -> list[Point]:
    """The points that no other one beats in both reward and tax, by rising reward."""
    listed = list(points)
    kept = pareto_front([(point.reward, tax.of(point)) for point in listed], maximize=[True, tax.sign > 0])
    return sorted((listed[i] for i in kept), key=lambda point: point.reward)


def from_front(point: Point, others: Iterable[Point], tax: Tax) -> float:
    """The point's tax minus that of the others' front at the same reward.

    Between its points the front is a straight line; past its ends the end counts.
    """
    line = front(others, tax)
    return tax.of(point) - float(np.interp(point.reward, [p.reward for p in line], [tax.of(p) for p in line]))


def adamw_line(point: Point) -> bool:
    """AdamW at all learning rates and all interpolations back to the start."""
    return point.start == "sft" and point.role in ("adamw", "interpolation")


def tau_afterwards(point: Point) -> bool:
    """The same, and c*tau added after AdamW."""
    return adamw_line(point) or (point.start == "sft" and point.role == "tau afterwards")


def from_full(point: Point) -> bool:
    """AdamW from the full SFT instead of the partial one."""
    return point.start == "sft-full" and point.run.startswith("adamw")


def free(point: Point) -> bool:
    """All that needs no new optimizer."""
    return tau_afterwards(point) or from_full(point)


COMPARED = ("method", "control")
FREE = "all of these"
FAMILIES: dict[str, Callable[[Point], bool]] = {
    "AdamW and its interpolations": adamw_line,
    "these and AdamW + c*tau afterwards": tau_afterwards,
    "AdamW from the full SFT": from_full,
    FREE: free,
}


def differences(points: Sequence[Point], run: str, family: str, tax: Tax) -> list[float]:
    """One paired difference for each seed and data order: same base, same SFT, same pairs, same order."""
    result = []
    for point in points:
        if point.run == run and point.role in COMPARED:
            unit = [p for p in points if (p.seed, p.order) == (point.seed, point.order)]
            peers = [p for p in unit if FAMILIES[family](p) and p.run != run]
            if peers:
                result.append(from_front(point, peers, tax))
    return result


# ---------------------------------------------------------------- words


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    text = f"{fmean(values):{sign}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def better(changes: Sequence[float], tax: Tax) -> str:
    """In how many runs a change is an improvement."""
    return f"{sum(tax.sign * change > 0 for change in changes)} of {len(changes)}"


def changed(changes: Sequence[float], tax: Tax) -> str:
    """A change with its spread, and how often it is an improvement."""
    return f"{tax.name} {spread(changes, tax.digits, '+')} (better in {better(changes, tax)})"


def compared(points: Sequence[Point], run: str, family: str) -> str:
    """A run against a family of points, in both measures of the tax; empty without such points."""
    changes = {tax: differences(points, run, family, tax) for tax in TAXES}
    return ", ".join(changed(values, tax) for tax, values in changes.items() if values)


def runs_of(points: Sequence[Point], *roles: str) -> list[str]:
    """The names of the runs with one of these roles, in the order in which they were trained."""
    return list(dict.fromkeys(point.run for point in points if point.role in roles))


def summary(points: Sequence[Point]) -> list[str]:
    """The outcome in sentences that are made of the numbers."""
    units = {(p.seed, p.order) for p in points if p.order is not None}
    seeds, orders = (sorted({unit[i] for unit in units}) for i in (0, 1))
    caution = " One run has no spread: small differences mean nothing." if len(units) == 1 else ""
    lines = [f"Seeds {seeds}, data orders {orders}: {len(units)} paired run(s).{caution}"]
    counts = [
        f"{run} {' and '.join(f'in {tax.name} in {better(differences(points, run, FREE, tax), tax)}' for tax in TAXES)}"
        for run in runs_of(points, "method")
    ]
    lines.append(
        "In short: against all that needs no new optimizer (AdamW, its interpolations, c*tau added afterwards, AdamW "
        f"from the full SFT), at equal reward, the runs in which online merging is better: {'; '.join(counts)}."
    )

    def mean(field: str, role: str, run: str) -> float:
        return fmean(getattr(p, field) for p in points if (p.role, p.run) == (role, run))

    moved = [
        f"{field.replace('_', ' ')} {mean(field, 'checkpoint', 'sft'):.2f} -> {mean(field, 'adamw', MAIN.name):.2f}"
        for field in ("reward", "exact_match", "perplexity")
    ]
    lines.append(f"The tax: preference training from sft with {MAIN.name} moves {', '.join(moved)}.")

    at_start = {p.seed: p for p in points if (p.role, p.run) == ("checkpoint", "sft")}
    for c in ADDED_TAU:
        further = [p for p in points if (p.role, p.run, p.value) == ("pre-check", "sft", c)]
        changes = [changed([tax.of(p) - tax.of(at_start[p.seed]) for p in further], tax) for tax in TAXES]
        lines.append(f"Pre-check, no preference training: sft + {c} tau against sft: {', '.join(changes)}.")

    for run in runs_of(points, "method"):
        for family in FAMILIES:
            if text := compared(points, run, family):
                lines.append(f"{run} against {family}, at equal reward: {text}.")
    return lines


def markdown(setting: Setting, points: Sequence[Point]) -> str:
    """The sentences, the models, and the sweeps."""
    sweeps = [p for p in points if p.role in ("interpolation", "pre-check")]
    models = [p for p in points if p not in sweeps]
    parts = [
        f"# The alignment tax, setting `{setting.name}`",
        "\n".join(f"- {line}" for line in summary(points)),
        "*At equal reward*: each run against the front of points that share its seed and data order, read "
        "off the straight lines between its points. For exact match + is better, for perplexity -.",
        f"`sft` is base + {SFT_SHARE} (sft-full - base), and tau = sft - base; the other names are explained "
        "in the README beside the script. Means ± standard deviation over runs. *Along tau* is the movement "
        "from the start in units of tau, *cos* the cosine between the two.",
        "## Models\n\n" + _rows(models),
        "## Paired differences at equal reward\n\n" + _paired(points),
        "## Sweeps\n\n" + _rows(sweeps),
    ]
    return "\n\n".join(parts) + "\n"


def _paired(points: Sequence[Point]) -> str:
    lines = ["| run | " + " | ".join(FAMILIES) + " |", "|---" * (1 + len(FAMILIES)) + "|"]
    for run in runs_of(points, *COMPARED):
        lines.append("| " + " | ".join([run, *(compared(points, run, family) for family in FAMILIES)]) + " |")
    return "\n".join(lines)


def _rows(points: Sequence[Point]) -> str:
    lines = ["| model | reward | exact match | perplexity | along tau | cos |", "|---|---|---|---|---|---|"]
    for label in dict.fromkeys(point.label for point in points):
        same = [point for point in points if point.label == label]
        columns = [("reward", 2), ("exact_match", 3), ("perplexity", 2), ("along_tau", 2), ("cosine", 2)]
        cells = [spread([getattr(point, field) for point in same], digits) for field, digits in columns]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- picture

INK, SOFT, BLUE, ORANGE, GREEN, PURPLE = "#1f2328", "#8b949e", "#0969da", "#d1570c", "#1a7f37", "#8250df"
MARKS = {"ondare": ("OnDARE", ORANGE, "s"), "onties": ("OnTIES", GREEN, "D")}


def draw(path: Path, points: Sequence[Point]) -> None:
    """Reward to the right, what is kept of the old skills upwards: further up and right is better."""
    with matplotlib.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 6), dpi=130, layout="constrained")
        axes = figure.subplots(1, 2)
        for axis, tax in zip(axes, TAXES, strict=True):
            _panel(axis, points, tax)
            axis.set_title(tax.title, loc="left", fontsize=12, color=INK)
            # The fronts are steep near the maximum of 4: there the axis shows more.
            axis.set_xscale("function", functions=(lambda r: -np.log(4 - r), lambda x: 4 - np.exp(-x)))
            axis.set_xlabel("reward (0 to 4; the axis widens to the right)")
            axis.xaxis.set_major_locator(FixedLocator([1.5, 2, 2.5, 2.75, 3, 3.25, 3.5]))
            axis.grid(color="#eaeef2")
            axis.set_axisbelow(True)
            axis.yaxis.set_inverted(tax.sign < 0)
        figure.get_layout_engine().set(wspace=0.06)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        units = len({(p.seed, p.order) for p in points if p.order is not None})
        runs = "one run" if units == 1 else f"means over {units} runs, bars: standard deviation"
        figure.suptitle(f"What preference training earns and costs: up and right is better ({runs})", color=INK)
        figure.savefig(path, metadata={"Software": None})


def _panel(axis: Axes, points: Sequence[Point], tax: Tax) -> None:
    def place(role: str, run: str, value: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over the runs of (reward, tax)."""
        same = [p for p in points if (p.role, p.run, p.value) == (role, run, value)]
        found = np.array([(p.reward, tax.of(p)) for p in same])
        return found.mean(axis=0), found.std(axis=0, ddof=1) if len(found) > 1 else np.zeros(2)

    def mark(role: str, run: str, name: str | None, color: str, marker: str, size: float, **style) -> None:
        at, sd = place(role, run)
        bars = {"xerr": sd[0], "yerr": sd[1], "elinewidth": 0.7} if sd.any() else {}
        axis.errorbar(*at, **bars, fmt="none", ecolor=color, alpha=0.6, zorder=3)
        axis.plot(*at, marker, color=color, ms=size, label=name, zorder=5, **style)

    def note(text: str, at: np.ndarray, color: str, shift: tuple[int, int], align: str) -> None:
        axis.annotate(
            text,
            at,
            shift,
            textcoords="offset points",
            fontsize=9,
            color=color,
            ha=align,
            va="center",
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            zorder=4.5,
        )

    start = place("checkpoint", "sft")[0]
    for run in runs_of(points, "adamw"):
        main = run == MAIN.name
        end = place("adamw", run)[0]
        between = [place("interpolation", run, ratio)[0] for ratio in RATIOS]
        axis.plot(
            *np.array([start, *between, end]).T,
            color=BLUE if main else SOFT,
            marker=".",
            lw=1.8 if main else 0.9,
            label="from SFT to AdamW, by ratio" if main else None,
            zorder=4 if main else 3,
        )
        added = [place("tau afterwards", run, c)[0] for c in ADDED_TAU]
        axis.plot(
            *np.array([end, *added]).T,
            color=PURPLE,
            marker=".",
            lw=1.6 if main else 0.8,
            ls="--",
            label="AdamW, then + c·tau" if main else None,
            zorder=4 if main else 3,
        )
        mark("adamw", run, "AdamW" if main else None, BLUE if main else SOFT, "o", 8)
        note(f"lr {run.removeprefix('adamw-lr')}", end, BLUE if main else SOFT, (-8, -10), "right")
        if main:
            for ratio, at in zip(RATIOS, between, strict=True):
                note(f"{ratio}", at, BLUE, (7, 4), "left")
            for c, at in zip(ADDED_TAU, added, strict=True):
                note(f"+{c}", at, PURPLE, *(((0, 9), "center") if tax.sign > 0 else ((-7, 0), "right")))
    for run, (name, color, marker) in MARKS.items():
        mark("method", run, name, color, marker, 10)
    for run in FROM_FULL:
        mark("control", run.name, "AdamW from the full SFT" if run.lr == MAIN.lr else None, BLUE, "o", 8, mfc="none")
    mark("checkpoint", "sft", "SFT (start)", INK, "*", 16)
