"""From points to the record of the study: table.json, table.md and one picture per algorithm."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import fmean

from claims import PATH, SCORES, claims
from comparisons import (
    OPPONENTS,
    UNIFORM,
    Changes,
    Opponents,
    Unit,
    by_algorithm,
    counted,
    digits,
    family_beyond_halfway,
    own_volume,
    paired,
    reward_at_equal_tax,
    score_beyond,
    tax_at_equal_reward,
    units_of,
    volume,
    volume_beyond,
)
from front_pictures import draw
from plan import ADAMW, ALGORITHMS, CONTENDERS, MEAN_RATIO, Algorithm, Contender, Point, Size
from report import PACKAGES, TAXES, Tax, from_front, spread
from statements import RULE, Claim

Chosen = Mapping[tuple[str, str], float]
AtEqual = Callable[[Iterable[Unit], str, Opponents, Tax], Changes]


def write_report(out: Path, size: Size, points: Sequence[Point], chosen: Chosen) -> list[Path]:
    """Write table.json, table.md and a picture of every algorithm into `out`.

    Args:
        out: a folder.
        size: what was run.
        points: everything that was measured, of the tuning seed too.
        chosen: the setting of every algorithm and contender.
    """
    out.mkdir(parents=True, exist_ok=True)
    units = units_of(points, size)
    found = claims(units, size)
    table, text = out / "table.json", out / "table.md"
    content = {
        "size": asdict(size),
        "chosen": [[*key, value] for key, value in chosen.items()],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in (*PACKAGES, "peft")}},
        "claims": [
            {
                "paper": claim.paper,
                "claim": claim.text,
                "verdict": claim.verdict,
                "sentences": [*map(str, claim.sentences)],
            }
            for claim in found
        ],
    }
    # A point in a line: there are more than a thousand.
    lines = ",\n".join(json.dumps(asdict(point)) for point in points)
    table.write_text(json.dumps(content, indent=1).removesuffix("\n}") + f',\n "points": [\n{lines}\n]}}\n')
    text.write_text(markdown(size, points, units, chosen, found))
    pictures = []
    for algorithm, own in by_algorithm(units).items():
        pictures.append(out / f"fronts-{algorithm.name}.png")
        draw(pictures[-1], algorithm.title, own)
    return [table, text, *pictures]


def markdown(size: Size, points: Sequence[Point], units: Sequence[Unit], chosen: Chosen, found: Sequence[Claim]) -> str:
    """The summary, the claims, then everything by algorithm, and every setting that was tried."""
    runs = len({(unit.key.seed, unit.key.order) for unit in units})
    caution = "" if runs > 1 else " One run has no spread: small differences mean nothing, and no claim is judged."
    parts = [
        f"# Online merging and averaging against their rivals, size `{size.name}`",
        f"Seeds {list(size.seeds)}, data orders {list(size.orders)}: {runs} paired run(s) of each algorithm.{caution} "
        f"{_tuning(size)} Means ± standard deviation over runs; differences are taken within a run, and *(5 of 6)* is "
        "the number of runs in which one is an improvement. Of perplexity less is better.",
        "*At equal reward*: a model's tax minus that of its opponents where they earn as much, on the straight lines "
        "between the points of their Pareto front; past its ends the end counts. *At equal tax* likewise. *AdamW and "
        "its path* is the start, AdamW's model, and what lies between them at one ratio for all; *all rivals* is that "
        "and all other models that need no merging while training, at one chosen setting each. The linear merge is a "
        "point of the path itself.",
        "*Hypervolume*: the area of reward and tax that the start and a model dominate, from the base's reward and "
        "exact match 0, or twice the larger perplexity of start and AdamW in that run. It also depends on where along "
        "the path a model stands, so claims about single models go by the tax at equal reward.",
        RULE,
    ]
    for tax in TAXES:
        sign = "+" if tax.sign > 0 else "-"
        title = f"## Summary: {tax.name} at equal reward, against {PATH}"
        parts.append(f"{title}\n\n{sign} is better.\n\n{_summary(units, tax)}")
    parts.append("## Claims\n\n" + "\n".join(_claim(i, claim) for i, claim in enumerate(found, 1)))
    for algorithm, own in by_algorithm(units).items():
        parts += _of_algorithm(algorithm, own, chosen)
    for name in size.algorithms:
        if rows := _tried(name, size, points, chosen):
            parts.append(f"## {ALGORITHMS[name].title}: all settings tried, on seed {size.tuning_seed}\n\n{rows}")
    return "\n\n".join(parts) + "\n"


def _tuning(size: Size) -> str:
    if size.tuning_seed is None:
        return "No setting was chosen: each contender takes the middle one of its own."
    return (
        f"Each contender's setting was chosen on seed {size.tuning_seed}, which counts nowhere else, by the product of "
        "exact match and the reward beyond the base's."
    )


def _claim(number: int, claim: Claim) -> str:
    """A claim with its verdict, and its two sentences indented below."""
    head = f"{number}. *{claim.text}* ({claim.paper}): **{claim.verdict}**."
    return "\n".join([head, *(f"    - {sentence}" for sentence in claim.sentences)])


# ---------------------------------------------------------------- tables


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _present(units: Iterable[Unit]) -> list[Contender]:
    """The contenders that were run, in the order of the plan."""
    run = {name for unit in units for name in unit.models}
    return [contender for contender in CONTENDERS.values() if contender.name in run]


def _columns(
    names: Sequence[str], columns: Sequence[Sequence[Changes]], places: Sequence[int | None]
) -> list[list[str]]:
    """Rows of a name and its changes; without places, a column shows as many decimals as its largest value needs."""
    shown = [
        digits([value for changes in column for value in changes.values]) if fixed is None else fixed
        for column, fixed in zip(columns, places, strict=True)
    ]
    return [
        [name, *(counted(column[i], fixed) for column, fixed in zip(columns, shown, strict=True))]
        for i, name in enumerate(names)
    ]


def _summary(units: Sequence[Unit], tax: Tax) -> str:
    names = [contender.name for contender in _present(units) if contender.name != ADAMW]
    grouped = by_algorithm(units)
    columns = [
        [tax_at_equal_reward(own, name, OPPONENTS[PATH], tax) for name in names] for own in [*grouped.values(), units]
    ]
    head = ["", *(algorithm.title for algorithm in grouped), "all"]
    return _table(head, _columns(names, columns, [tax.digits] * len(columns)))


def _of_algorithm(algorithm: Algorithm, units: Sequence[Unit], chosen: Chosen) -> list[str]:
    name, title = algorithm.name, algorithm.title
    fixed: list[int | None] = [tax.digits for _ in OPPONENTS for tax in TAXES]
    free: list[int | None] = [None] * len(fixed)
    return [
        f"## {title}: models\n\n![reward against exact match and perplexity](fronts-{name}.png)\n\n"
        + _models(name, units, chosen),
        f"## {title}: at equal reward\n\n{_compared(units, tax_at_equal_reward, '', fixed)}",
        f"## {title}: reward at equal tax\n\n{_compared(units, reward_at_equal_tax, 'at equal ', free)}",
        f"## {title}: against AdamW's model itself\n\n{_against_adamw(units)}",
        f"## {title}: averages of the start (ratio 0) and AdamW's model (1)\n\n{_averages(units)}",
        f"## {title}: hypervolumes of averages\n\n"
        "Each counts the start and AdamW's model besides its own. The last three columns compare a search with one "
        f"ratio for all at the same mean, {MEAN_RATIO}.\n\n{_family_volumes(units)}",
    ]


def _models(name: str, units: Sequence[Unit], chosen: Chosen) -> str:
    reward = digits([point.reward for unit in units for point in unit.models.values()])
    scores = {"reward": reward, "exact_match": 3, "perplexity": 2, "along_tau": 2, "cosine": 2}

    def cells(points: Sequence[Point]) -> list[str]:
        return [spread([getattr(point, field) for point in points], places) for field, places in scores.items()]

    # Two data orders share their start.
    first = {unit.key.seed: unit for unit in units}.values()
    rows = [["base", "", *cells([unit.base for unit in first]), "", ""]]
    rows.append(["start", "", *cells([unit.start for unit in first]), "", ""])
    contenders = _present(units)
    volumes = [
        [[own_volume(unit, c.name, tax) for unit in units if c.name in unit.models] for c in contenders]
        for tax in TAXES
    ]
    places = [digits([value for row in column for value in row]) for column in volumes]
    for i, contender in enumerate(contenders):
        points = [unit.models[contender.name] for unit in units if contender.name in unit.models]
        hyper = [spread(column[i], shown) for column, shown in zip(volumes, places, strict=True)]
        rows.append([contender.name, f"{chosen[name, contender.name]:.4g}", *cells(points), *hyper])
    head = ["model", "setting", "reward", "exact match", "perplexity", "along tau", "cos"]
    return _table([*head, *(f"hypervolume, {tax.name}" for tax in TAXES)], rows)


def _compared(units: Sequence[Unit], at_equal: AtEqual, lead: str, places: Sequence[int | None]) -> str:
    """Every contender against each of its opponents, in both measures of the tax."""
    names = [contender.name for contender in _present(units)]
    pairs = [(opponent, tax) for opponent in OPPONENTS for tax in TAXES]
    columns = [[at_equal(units, name, OPPONENTS[opponent], tax) for name in names] for opponent, tax in pairs]
    head = ["model", *(f"{lead}{tax.name} against {opponent}" for opponent, tax in pairs)]
    return _table(head, _columns(names, columns, places))


def _against_adamw(units: Sequence[Unit]) -> str:
    names = [contender.name for contender in _present(units) if contender.name != ADAMW]
    columns = [[score_beyond(units, name, ADAMW, field) for name in names] for field in SCORES]
    columns += [[volume_beyond(units, name, ADAMW, tax) for name in names] for tax in TAXES]
    head = ["model", "reward", "exact match", "perplexity", *(f"hypervolume, {tax.name}" for tax in TAXES)]
    return _table(head, _columns(names, columns, [None, *(tax.digits for tax in TAXES), None, None]))


# ---------------------------------------------------------------- averages


def _families(units: Sequence[Unit]) -> list[str]:
    return list(dict.fromkeys(family for unit in units for family in unit.averages))


def _averages(units: Sequence[Unit]) -> str:
    places = digits([point.reward for unit in units for point in unit.path])
    rows = []
    for family in _families(units):
        for ratio in dict.fromkeys(point.setting for unit in units for point in unit.averages.get(family, ())):
            pairs = [(u, p) for u in units for p in u.averages.get(family, ()) if p.setting == ratio]
            row = [family, f"{ratio:g}"]
            for field, shown in zip(SCORES, (places, 3, 2), strict=True):
                row.append(spread([getattr(point, field) for _, point in pairs], shown))
            for tax in TAXES:
                changes = Changes({unit.key: from_front(point, unit.path, tax) for unit, point in pairs}, tax.sign)
                row.append("" if family == UNIFORM else counted(changes, tax.digits))
            of_parts = zip(*(point.ratios for _, point in pairs), strict=True)
            row.append(" ".join(f"{fmean(ratios):.2f}" for ratios in of_parts))
            rows.append(row)
    head = ["family", "ratio", "reward", "exact match", "perplexity"]
    head += [f"{tax.name} at equal reward against the path" for tax in TAXES]
    return _table([*head, "ratios of the parts, low to high (means)"], rows)


def _family_volumes(units: Sequence[Unit]) -> str:
    families = _families(units)
    searched = [family for family in families if family.startswith("adaptive")]
    rows = []
    for family in families:
        having = [unit for unit in units if family in unit.averages]
        row = [family, str(len(having[0].family(family)))]
        for tax in TAXES:
            values = [volume(unit, unit.family(family), tax) for unit in having]
            row.append(spread(values, digits(values)))
        if family in searched:
            row += [counted(family_beyond_halfway(units, family, tax)) for tax in TAXES]
            row += [
                counted(
                    paired(units, lambda u, f=family: u.averages[f][0].reward - u.halfway.reward, (family, UNIFORM))
                )
            ]
        else:
            row += [""] * 3
        rows.append(row)
    head = ["family", "models", *(f"hypervolume, {tax.name}" for tax in TAXES)]
    return _table([*head, *(f"hypervolume beyond, {tax.name}" for tax in TAXES), "reward beyond"], rows)


# ---------------------------------------------------------------- settings


def _tried(name: str, size: Size, points: Sequence[Point], chosen: Chosen) -> str:
    """All models of the tuning seed; empty without one."""
    own = [point for point in points if point.seed == size.tuning_seed and point.algorithm in (None, name)]
    if not own:
        return ""
    places = digits([point.reward for point in own])
    rows = []
    for point in own:
        picked = point.algorithm and point.setting == chosen.get((name, point.family))
        setting = "" if point.setting is None else f"{point.setting:.4g}"
        scores = [f"{point.reward:.{places}f}", f"{point.exact_match:.3f}", f"{point.perplexity:.2f}"]
        meaning = CONTENDERS[point.family].meaning.replace("|", r"\|") if point.family in CONTENDERS else ""
        moved = [f"{point.along_tau:.2f}", f"{point.cosine:.2f}"]
        rows.append([point.family, meaning, setting, *scores, *moved, "yes" if picked else ""])
    head = [
        "model",
        "what the setting is",
        "setting",
        "reward",
        "exact match",
        "perplexity",
        "along tau",
        "cos",
        "chosen",
    ]
    return _table(head, rows)
