"""From points to fronts: differences within a seed, hypervolumes, tables. Nothing here knows what should come out."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from averaging import UNIFORM, Point, adaptive, one_part
from experiment import PARTS, Setting
from picture import draw
from report import PACKAGES, TAXES, Tax, from_front, spread

from fused_merge import hypervolume

# What counts as worthless: less reward than any model here earns, no task answered, the perplexity of none of them.
REFERENCE = {"exact_match": (1.0, 0.0), "perplexity": (1.0, 20.0)}


def write_report(out: Path, setting: Setting, points: Sequence[Point]) -> list[Path]:
    """Write table.json, table.md and fronts.png into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    files = [out / name for name in ("table.json", "table.md", "fronts.png")]
    by_tax = {
        tax.field: {family: volumes(points, setting, family, tax) for family in families(setting)} for tax in TAXES
    }
    content = {
        "setting": asdict(setting),
        "reference": REFERENCE,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "hypervolumes": by_tax,
        "points": [asdict(point) for point in points],
    }
    files[0].write_text(json.dumps(content, indent=1) + "\n")
    files[1].write_text(markdown(setting, points))
    draw(files[2], setting, points, by_tax)
    return files


# ---------------------------------------------------------------- comparisons


def families(setting: Setting) -> list[str]:
    """All families, in the order of tables and pictures."""
    return [UNIFORM, *map(one_part, PARTS), *map(adaptive, setting.searched)]


def of_seed(points: Iterable[Point], seed: int, family: str) -> list[Point]:
    """The points of a family."""
    return [point for point in points if (point.seed, point.family) == (seed, family)]


def front_of(points: Sequence[Point], setting: Setting, seed: int, family: str) -> list[Point]:
    """What a family offers: its models and the two trained ones; of one ratio for all, those at the mean ratios."""
    line = of_seed(points, seed, UNIFORM)
    ends = [point for point in line if point.ratio in (0.0, 1.0)]
    own = [point for point in line if point.ratio in setting.mean_ratios]
    return ends + (own if family == UNIFORM else of_seed(points, seed, family))


def volume(points: Iterable[Point], tax: Tax) -> float:
    """How much of reward and tax the points dominate, from the reference on."""
    return hypervolume([(p.reward, tax.of(p)) for p in points], REFERENCE[tax.field], maximize=[True, tax.sign > 0])


def volumes(points: Sequence[Point], setting: Setting, family: str, tax: Tax) -> list[float]:
    """The hypervolume of a family for each seed."""
    return [volume(front_of(points, setting, seed, family), tax) for seed in setting.seeds]


def gains(points: Sequence[Point], setting: Setting, family: str, tax: Tax) -> list[float]:
    """The hypervolume beyond that of one ratio for all, for each seed."""
    found, plain = (volumes(points, setting, name, tax) for name in (family, UNIFORM))
    return [own - other for own, other in zip(found, plain, strict=True)]


def at_equal_reward(points: Sequence[Point], point: Point, tax: Tax) -> float:
    """The point's tax minus that of one ratio for all where it earns as much: the whole grid, and straight lines."""
    return from_front(point, of_seed(points, point.seed, UNIFORM), tax)


def paired(points: Sequence[Point], family: str, ratio: float, other: float) -> list[tuple[Point, Point]]:
    """For each seed the family's model at `ratio`, and that of one ratio for all at `other`."""
    own = [point for point in points if (point.family, point.ratio) == (family, ratio)]
    line = {(point.seed, point.ratio): point for point in points if point.family == UNIFORM}
    return [(point, line[point.seed, other]) for point in own]


# ---------------------------------------------------------------- tables


def markdown(setting: Setting, points: Sequence[Point]) -> str:
    """Hypervolumes, differences, the ratios that were found, and all models."""
    reward, _ = REFERENCE["exact_match"]
    lowest, highest = REFERENCE["exact_match"][1], REFERENCE["perplexity"][1]
    parts = [
        f"# Averaging by depth, setting `{setting.name}`",
        f"Seeds {list(setting.seeds)}; means ± standard deviation over seeds. Ratio 0 is `sft`, 1 is `rlhf`. "
        "Differences are taken within a seed, *(2 of 3)* is the number of seeds in which one is an improvement; of "
        "perplexity and loss less is better. *At equal reward*: against one ratio for all where it earns as much, on "
        f"straight lines between the ratios {list(setting.uniform_ratios)}.",
        "## Hypervolumes\n\n"
        f"From reward {reward:g} and exact match {lowest:g}, or perplexity {highest:g}. Every family "
        f"counts the two trained models; `{UNIFORM}` counts the ratios {list(setting.mean_ratios)} besides, as "
        f"`adaptive` does, and a third alone {list(setting.part_ratios)}.\n\n" + _volumes(setting, points),
        f"## Adaptive against one ratio for all, at the same mean ratio\n\n{_searched(setting, points)}",
        f"## One third alone at a ratio, the others at 1: against `rlhf`\n\n{_parts(setting, points)}",
        f"## Ratios found, from low layers to high\n\n{_found(setting, points)}",
        f"## Models\n\n{_models(setting, points)}",
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _difference(changes: Sequence[float], digits: int, sign: int = 1) -> str:
    """A paired difference with its spread, and in how many seeds it is an improvement."""
    return f"{spread(changes, digits, '+')} ({sum(sign * change > 0 for change in changes)} of {len(changes)})"


def _volumes(setting: Setting, points: Sequence[Point]) -> str:
    head = ["family", "models"]
    for tax in TAXES:
        head += [f"reward x {tax.name}", "against uniform (better in)"]
    rows = []
    for family in families(setting):
        row = [family, str(len(front_of(points, setting, setting.seeds[0], family)))]
        for tax, digits in zip(TAXES, (3, 2), strict=True):
            change = _difference(gains(points, setting, family, tax), digits) if family != UNIFORM else ""
            row += [spread(volumes(points, setting, family, tax), digits), change]
        rows.append(row)
    return _table(head, rows)


def _changes(points: Sequence[Point], family: str, ratio: float, other: float) -> list[str]:
    pairs = paired(points, family, ratio, other)
    cells = [_difference([own.reward - plain.reward for own, plain in pairs], 3)]
    cells += [
        _difference([tax.of(own) - tax.of(plain) for own, plain in pairs], digits, tax.sign)
        for tax, digits in zip(TAXES, (3, 2), strict=True)
    ]
    cells += [
        _difference([at_equal_reward(points, own, tax) for own, _ in pairs], digits, tax.sign)
        for tax, digits in zip(TAXES, (3, 2), strict=True)
    ]
    return cells


CHANGES = ("reward", "exact match", "perplexity", "exact match at equal reward", "perplexity at equal reward")


def _searched(setting: Setting, points: Sequence[Point]) -> str:
    rows = []
    for parts in setting.searched:
        for mean in setting.mean_ratios:
            pairs = paired(points, adaptive(parts), mean, mean)
            loss = _difference([own.answer_loss - plain.answer_loss for own, plain in pairs], 3, -1)
            rows.append([str(parts), f"{mean:g}", *_changes(points, adaptive(parts), mean, mean), loss])
    return _table(["K", "mean ratio", *CHANGES, "loss of the search"], rows)


def _parts(setting: Setting, points: Sequence[Point]) -> str:
    rows = [
        [part, f"{ratio:g}", *_changes(points, one_part(part), ratio, 1.0)]
        for part in PARTS
        for ratio in reversed(setting.part_ratios)
    ]
    return _table(["third", "ratio", *CHANGES], rows)


def _found(setting: Setting, points: Sequence[Point]) -> str:
    rows = []
    for parts in setting.searched:
        for mean in setting.mean_ratios:
            own = [point for point, _ in paired(points, adaptive(parts), mean, mean)]
            rows.append([str(parts), f"{mean:g}", *(" ".join(f"{r:.2f}" for r in point.ratios) for point in own)])
    return _table(["K", "mean ratio", *(f"seed {seed}" for seed in setting.seeds)], rows)


def _models(setting: Setting, points: Sequence[Point]) -> str:
    columns = [("reward", 2), ("exact_match", 3), ("perplexity", 2), ("answer_loss", 3)]
    rows = []
    for family in families(setting):
        for ratio in dict.fromkeys(point.ratio for point in points if point.family == family):
            same = [point for point in points if (point.family, point.ratio) == (family, ratio)]
            cells = [spread([getattr(point, field) for point in same], digits) for field, digits in columns]
            rows.append([family, f"{ratio:g}", *cells])
    return _table(["family", "ratio", "reward", "exact match", "perplexity", "loss of the search"], rows)
