"""What is compared with what, within one algorithm, seed and data order. Nothing here knows what should come out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, log10
from statistics import fmean, stdev

import numpy as np
from plan import ADAMW, ALGORITHMS, CONTENDERS, MEAN_RATIO, Algorithm, Point, Size
from report import TAXES, Tax, from_front, front, spread

from fused_merge import hypervolume

UNIFORM = "uniform"
# Rivals that keep the training near its start, or average over it, and those that merge what has been trained.
REGULARIZERS = (
    "early stop",
    "learning rate",
    "beta",
    "L2 to SFT",
    "weight EMA",
    "BEMA",
    "LoRA",
    "SFT replay",
    "half back to SFT",
)
OFFLINE = ("linear merge", "TIES merge", "DARE merge", "+ c tau")


@dataclass(frozen=True)
class Key:
    """What all models of a unit share."""

    algorithm: str
    seed: int
    order: int


@dataclass(frozen=True)
class Unit:
    """The models that share algorithm, seed and data order, and so can be compared one by one.

    Attributes:
        models: by contender.
        averages: of the start and AdamW, by family.
    """

    key: Key
    base: Point
    start: Point
    models: Mapping[str, Point]
    averages: Mapping[str, Sequence[Point]]

    @property
    def path(self) -> list[Point]:
        """What needs no more than one training by AdamW: its model, the start, and one ratio for all between them."""
        return [self.start, *self.averages.get(UNIFORM, ()), self.models[ADAMW]]

    def rivals(self, name: str) -> list[Point]:
        """The path, and all other contenders that need no optimizer of ours."""
        others = [c.name for c in CONTENDERS.values() if c.group == "rival" and c.name not in (name, ADAMW)]
        path = [point for point in self.path if name != ADAMW or point is not self.models[ADAMW]]
        return path + [self.models[other] for other in others if other in self.models]

    def among(self, names: Iterable[str]) -> list[Point]:
        """The start, AdamW, and those of the named contenders that were run."""
        return [self.start, self.models[ADAMW], *(self.models[name] for name in names if name in self.models)]

    def family(self, name: str) -> list[Point]:
        """The start, AdamW, and the averages of a family."""
        return [self.start, self.models[ADAMW], *self.averages[name]]

    @property
    def halfway(self) -> Point:
        """One ratio for all, the mean ratio of the search."""
        [found] = [point for point in self.averages[UNIFORM] if point.setting == MEAN_RATIO]
        return found


def units_of(points: Iterable[Point], size: Size) -> list[Unit]:
    """The units that are reported, in the order of the size's algorithms; the tuning seed is none of them."""
    starts: dict[tuple[int, str], Point] = {}
    groups: dict[Key, list[Point]] = {}
    for point in points:
        if point.algorithm is None or point.order is None:
            starts[point.seed, point.family] = point
        elif point.seed in size.seeds:
            groups.setdefault(Key(point.algorithm, point.seed, point.order), []).append(point)
    keys = [Key(name, seed, order) for name in size.algorithms for seed in size.seeds for order in size.orders]
    units = []
    for key in keys:
        if key not in groups:
            continue
        models = {point.family: point for point in groups[key] if point.family in CONTENDERS}
        averages: dict[str, list[Point]] = {}
        for point in groups[key]:
            if point.family not in CONTENDERS:
                averages.setdefault(point.family, []).append(point)
        units.append(Unit(key, starts[key.seed, "base"], starts[key.seed, "sft"], models, averages))
    return units


def by_algorithm(units: Iterable[Unit]) -> dict[Algorithm, list[Unit]]:
    """The units of each algorithm."""
    grouped: dict[Algorithm, list[Unit]] = {}
    for unit in units:
        grouped.setdefault(ALGORITHMS[unit.key.algorithm], []).append(unit)
    return grouped


# ---------------------------------------------------------------- one number for a unit


def reward_from_front(point: Point, others: Iterable[Point], tax: Tax) -> float:
    """The point's reward minus that of the others' front at the same tax; straight lines, and past its ends the end."""
    line = front(others, tax)[::-1]  # by falling reward the tax improves
    at = np.interp(tax.sign * tax.of(point), [tax.sign * tax.of(p) for p in line], [p.reward for p in line])
    return point.reward - float(at)


def reference(unit: Unit, tax: Tax) -> tuple[float, float]:
    """Reward and tax that count as worthless.

    The reward is the base's, exact match none at all. The perplexity is twice the larger one of start and AdamW: the
    worst of all models would change with every contender that is added, and one that collapsed would decide it alone.
    """
    worst = 0.0 if tax.sign > 0 else 2 * max(tax.of(unit.start), tax.of(unit.models[ADAMW]))
    return unit.base.reward, worst


def volume(unit: Unit, points: Iterable[Point], tax: Tax) -> float:
    """The area of reward and tax that points dominate, from the reference on."""
    scores = [(point.reward, tax.of(point)) for point in points]
    return hypervolume(scores, reference(unit, tax), maximize=[True, tax.sign > 0])


def own_volume(unit: Unit, name: str, tax: Tax) -> float:
    """That of the start and a contender's model, a choice between two."""
    return volume(unit, [unit.start, unit.models[name]], tax)


# ---------------------------------------------------------------- paired over units


@dataclass(frozen=True)
class Changes:
    """Differences, one for each unit; `sign` is +1 where more is better, -1 where less is."""

    by_unit: Mapping[Key, float]
    sign: int = 1

    def __bool__(self) -> bool:
        return bool(self.by_unit)

    @property
    def values(self) -> list[float]:
        """The differences in the order of the units."""
        return list(self.by_unit.values())

    @property
    def wins(self) -> int:
        """How many are an improvement."""
        return sum(self.sign * value > 0 for value in self.values)

    @property
    def runs(self) -> list[float]:
        """The mean over algorithms for each seed and data order, larger is better.

        What shares a start is no independent evidence, however many algorithms were begun there.
        """
        grouped: dict[tuple[int, int], list[float]] = {}
        for key, value in self.by_unit.items():
            grouped.setdefault((key.seed, key.order), []).append(self.sign * value)
        return [fmean(values) for values in grouped.values()]

    @property
    def holds(self) -> bool | None:
        """Whether it is an improvement by the rule of the claims; None where there is no spread to judge by."""
        runs = self.runs
        if len(runs) < 2:
            return None
        error = stdev(runs) / len(runs) ** 0.5
        return fmean(runs) > 2 * error and 3 * self.wins > 2 * len(self.by_unit)


def paired(
    units: Iterable[Unit], difference: Callable[[Unit], float], needs: Collection[str] = (), sign: int = 1
) -> Changes:
    """A difference in every unit that has all the contenders and families it needs."""
    having = [unit for unit in units if all(name in unit.models or name in unit.averages for name in needs)]
    return Changes({unit.key: difference(unit) for unit in having}, sign)


Opponents = Callable[[Unit, str], list[Point]]
# What a contender is compared with.
OPPONENTS: dict[str, Opponents] = {
    "AdamW and its path": lambda unit, name: [] if name == ADAMW else unit.path,
    "all rivals": lambda unit, name: unit.rivals(name),
}


def tax_at_equal_reward(units: Iterable[Unit], name: str, opponents: Opponents, tax: Tax) -> Changes:
    """A contender's tax minus that of its opponents' front at the contender's reward."""
    having = [unit for unit in units if name in unit.models and opponents(unit, name)]
    changes = {unit.key: from_front(unit.models[name], opponents(unit, name), tax) for unit in having}
    return Changes(changes, tax.sign)


def reward_at_equal_tax(units: Iterable[Unit], name: str, opponents: Opponents, tax: Tax) -> Changes:
    """A contender's reward minus that of its opponents' front at the contender's tax."""
    having = [unit for unit in units if name in unit.models and opponents(unit, name)]
    return Changes({unit.key: reward_from_front(unit.models[name], opponents(unit, name), tax) for unit in having})


def farther(units: Iterable[Unit], name: str, other: str, tax: Tax) -> Changes:
    """A contender's tax at equal reward against AdamW and its path, minus the same of another.

    Of two models that earn differently, neither the tax nor a hypervolume says which one is the better trade: they
    differ between the points of the path itself. Here all of these count zero.
    """
    return paired(
        units,
        lambda unit: from_front(unit.models[name], unit.path, tax) - from_front(unit.models[other], unit.path, tax),
        (name, other),
        tax.sign,
    )


def volume_beyond(units: Iterable[Unit], name: str, other: str, tax: Tax) -> Changes:
    """A contender's hypervolume minus that of another."""
    return paired(units, lambda unit: own_volume(unit, name, tax) - own_volume(unit, other, tax), (name, other))


def score_beyond(units: Iterable[Unit], name: str, other: str, field: str) -> Changes:
    """A contender's reward or tax minus that of another, at whatever reward."""
    return paired(
        units,
        lambda unit: getattr(unit.models[name], field) - getattr(unit.models[other], field),
        (name, other),
        direction(field),
    )


def direction(field: str) -> int:
    """Whether more or less of a score is better."""
    return next((tax.sign for tax in TAXES if tax.field == field), 1)


def beyond_halfway(unit: Unit, family: str, tax: Tax) -> float:
    """The hypervolume of start, AdamW and a family's averages minus that with one ratio for all in their place.

    That ratio is the mean ratio of the search.
    """
    return volume(unit, unit.family(family), tax) - volume(unit, [*unit.among(()), unit.halfway], tax)


def family_beyond_halfway(units: Iterable[Unit], family: str, tax: Tax) -> Changes:
    """The same in every unit."""
    return paired(units, lambda unit: beyond_halfway(unit, family, tax), (family, UNIFORM))


# ---------------------------------------------------------------- words


def digits(values: Iterable[float], figures: int = 3) -> int:
    """Decimals that show so many figures of the largest value, three at most, whatever the scale of the reward."""
    largest = max(map(abs, values), default=0.0)
    return 3 if largest == 0 else min(max(figures - 1 - floor(log10(largest)), 0), 3)


def counted(changes: Changes, places: int | None = None) -> str:
    """Mean ± standard deviation (improvements of units), bold where the improvement holds; empty without a unit."""
    if not changes:
        return ""
    values = changes.values
    text = f"{spread(values, digits(values) if places is None else places, '+')} ({changes.wins} of {len(values)})"
    return f"**{text}**" if changes.holds else text
