"""What the two papers claim, and what the numbers say to it: sentences and verdicts are made from the numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean

from comparisons import (
    OFFLINE,
    OPPONENTS,
    REGULARIZERS,
    UNIFORM,
    Changes,
    Unit,
    beyond_halfway,
    by_algorithm,
    family_beyond_halfway,
    farther,
    paired,
    score_beyond,
    tax_at_equal_reward,
    volume,
)
from plan import ADAMW, CONTENDERS, MEAN_RATIO, OBJECTIVES, PART_RATIOS, SEARCHED_PARTS, Size
from report import TAXES, Tax, from_front
from statements import LIN, LU, OURS, Claim, Statement

ONLINE = ("OnDARE", "OnTIES")
PROJECTIONS = ("OnProj, gradient", "OnProj, update")
EXACT, PERPLEXITY = TAXES
SCORES = ("reward", "exact_match", "perplexity")
AVERAGING_RIVALS = ("early stop", "learning rate", "beta", "L2 to SFT", "LoRA", "SFT replay")
PATH, RIVALS = OPPONENTS  # AdamW and its path; all rivals
AT_EQUAL_REWARD = f"Tax at equal reward against {PATH}"


def claims(units: Sequence[Unit], size: Size) -> list[Claim]:
    """All claims, those of Lu et al. first; the sentences say what the verdict is taken from."""
    return [*_online(units, size), *_averaging(units)]


def _called(name: str) -> str:
    """A name without a comma, for a list."""
    first, _, rest = name.partition(", ")
    return f"{first} ({rest})" if rest else first


def _pairs(
    units: Sequence[Unit], pairs: Iterable[tuple[str, str]], taxes: Sequence[Tax] = TAXES
) -> list[tuple[str, Changes]]:
    """For each pair and tax, how much farther the first lies beyond AdamW's path than the second."""
    suffix = {tax: f", {tax.name}" for tax in taxes if len(taxes) > 1}
    return [
        (f"{_called(name)} minus {_called(other)}{suffix.get(tax, '')}", farther(units, name, other, tax))
        for name, other in pairs
        for tax in taxes
    ]


def _scores(units: Sequence[Unit], pairs: Iterable[tuple[str, str]]) -> list[tuple[str, Changes]]:
    return [
        (f"{_called(name)}, {field.replace('_', ' ')}", score_beyond(units, name, other, field))
        for name, other in pairs
        for field in SCORES
    ]


def _from_path(units: Sequence[Unit], names: Iterable[str]) -> list[tuple[str, Changes]]:
    return [
        (f"{_called(name)}, {tax.name}", tax_at_equal_reward(units, name, OPPONENTS[PATH], tax))
        for name in names
        for tax in TAXES
    ]


def _from_all_of(units: Sequence[Unit], names: Iterable[str], others: Sequence[str]) -> list[tuple[str, Changes]]:
    """At equal reward, against the front of the start, AdamW and the others taken together."""
    return [
        (f"{name}, {tax.name}", tax_at_equal_reward(units, name, lambda unit, _: unit.among(others), tax))
        for name in names
        for tax in TAXES
    ]


# ---------------------------------------------------------------- merging while training


def _online(units: Sequence[Unit], size: Size) -> Iterator[Claim]:
    yield Claim(
        LU,
        "Online merging gives a better trade than AdamW: a higher reward, a lower tax, and a lower tax at equal reward",
        (
            Statement("Their models differ from AdamW's", _scores(units, [(name, ADAMW) for name in ONLINE])),
            Statement(AT_EQUAL_REWARD, _from_path(units, ONLINE)),
        ),
    )
    for text, others in (
        (
            "It is better than regularization: stopping early, smaller steps, a stronger KL term, L2, averages over "
            "the training, LoRA, replay, going back to SFT",
            REGULARIZERS,
        ),
        (
            "It is better than merging the same models afterwards: linear, TIES, DARE, and c tau added to AdamW's",
            OFFLINE,
        ),
    ):
        one_by_one = [(name, other) for name in ONLINE for other in others]
        yield Claim(
            LU,
            text,
            (
                Statement(
                    "Tax at equal reward against the front of all of these, the start and AdamW",
                    _from_all_of(units, ONLINE, others),
                ),
                Statement(
                    f"One by one, exact match at equal reward against {PATH}, minus theirs",
                    _pairs(units, one_by_one, [EXACT]),
                    decides=False,
                ),
            ),
        )
    yield Claim(
        LU,
        "It works with every algorithm of preference training",
        tuple(
            Statement(
                f"{tax.name.capitalize()} at equal reward against {PATH}",
                [
                    (f"{name} with {algorithm.title}", tax_at_equal_reward(own, name, OPPONENTS[PATH], tax))
                    for algorithm, own in by_algorithm(units).items()
                    for name in ONLINE
                ],
            )
            for tax in TAXES
        ),
    )
    yield Claim(
        LU,
        "Both OnDARE and OnTIES work",
        (
            Statement(AT_EQUAL_REWARD, _from_path(units, ONLINE)),
            Statement("The same, one minus the other", _pairs(units, [("OnTIES", "OnDARE")]), decides=False),
        ),
    )
    steps = [(name, f"{name}, K = 8") for name in ONLINE] + [(f"{name}, K = 8", f"{name}, K = 64") for name in ONLINE]
    last = "which is one merge at the end" if size.steps == 64 else f"of {size.steps} steps"
    yield Claim(
        LU,
        "Merging at every K-th step leads from online to offline merging: the trade becomes worse from K = 1 over 8 to "
        f"64, {last}",
        (
            Statement(f"{AT_EQUAL_REWARD}, smaller K minus larger K", _pairs(units, steps)),
            Statement(
                "The less favorable one of both differences, which is an improvement where the order is monotone",
                [(f"{name}, {tax.name}", _monotone(units, name, tax)) for name in ONLINE for tax in TAXES],
                decides=False,
            ),
        ),
    )
    muon = [("Muon + OnDARE", "Muon")]
    yield Claim(
        LU,
        "It works around other optimizers than Adam",
        (
            Statement(f"{AT_EQUAL_REWARD}, merged Muon minus Muon", _pairs(units, muon)),
            Statement("Its models differ from Muon's", _scores(units, muon), decides=False),
        ),
    )
    yield Claim(
        OURS,
        "Taking the part against tau out of the gradient or the update gives a better trade than AdamW",
        (
            Statement(AT_EQUAL_REWARD, _from_path(units, PROJECTIONS)),
            Statement(
                "Their models differ from AdamW's",
                _scores(units, [(name, ADAMW) for name in PROJECTIONS]),
                decides=False,
            ),
        ),
    )
    vote = [("OnTIES", "OnTIES, paper's vote")]
    yield Claim(
        OURS,
        "OnTIES is a better trade with the vote of the published code than with that of the paper's equation",
        (
            Statement(f"{AT_EQUAL_REWARD}, code minus equation", _pairs(units, vote)),
            Statement("The models differ", _scores(units, vote), decides=False),
        ),
    )
    merging = [contender.name for contender in CONTENDERS.values() if contender.group == "merging"]
    yield Claim(
        OURS,
        "Merging while training is a better trade than all that needs no new optimizer, taken together",
        tuple(
            Statement(
                f"{tax.name.capitalize()} at equal reward against {RIVALS}",
                [(_called(name), tax_at_equal_reward(units, name, OPPONENTS[RIVALS], tax)) for name in merging],
            )
            for tax in TAXES
        ),
    )
    yield Claim(
        LU,
        "Its gains on models of billions of parameters are of the size reported, by MT-Bench and AlpacaEval too",
        (
            "The models of the study are smaller, and neither people nor a large model judge their answers.",
            "The signs of its differences may be compared with the papers'; their sizes may not.",
        ),
    )


# ---------------------------------------------------------------- averaging afterwards


def _averaging(units: Sequence[Unit]) -> Iterator[Claim]:
    yield Claim(
        LIN,
        "The tax exists: with every algorithm the reward rises, and other abilities fall",
        (
            Statement(
                "From the start to AdamW's model the reward changes by",
                [(algorithm.title, _tax_paid(own, "reward", 1)) for algorithm, own in by_algorithm(units).items()],
            ),
            Statement(
                "The old abilities change by (counted: runs in which they become worse)",
                [
                    (f"{algorithm.title}, {tax.name}", _tax_paid(own, tax.field, -tax.sign))
                    for algorithm, own in by_algorithm(units).items()
                    for tax in TAXES
                ],
            ),
        ),
    )
    yield Claim(
        LIN,
        "Averaging the models before and after preference training gives the best front of reward and tax",
        tuple(
            Statement(
                f"{tax.name.capitalize()} of the path between both minus that of a rival, at equal reward",
                [(rival, _path_over(units, rival, tax)) for rival in AVERAGING_RIVALS],
            )
            for tax in TAXES
        ),
    )
    low = [f"{part} third" for part in ("low", "middle", "high")]
    yield Claim(
        LIN,
        "Averaging low layers raises both, the reward and the old abilities, and is better than averaging others",
        (
            Statement(
                "The low third taken back, others as AdamW left them, changes",
                [
                    (
                        f"{field.replace('_', ' ')} at ratio {ratio:g}",
                        _third_over_adamw(units, low[0], ratio, field, sign),
                    )
                    for ratio in PART_RATIOS
                    for field, sign in (("reward", 1), ("exact_match", 1), ("perplexity", -1))
                ],
            ),
            Statement(
                "Hypervolume of the low third's averages beyond that",
                [
                    (f"of the {other}, {tax.name}", _family_over(units, low[0], other, tax))
                    for other in low[1:]
                    for tax in TAXES
                ],
            ),
        ),
    )
    searched = [(k, objective) for objective in OBJECTIVES for k in SEARCHED_PARTS]
    yield Claim(
        LIN,
        f"Ratios by part, found by search, are a better trade than one ratio for all at the same mean of {MEAN_RATIO}",
        tuple(
            Statement(
                f"Hypervolume of reward and {tax.name} beyond that of one ratio for all",
                [
                    (f"K = {k}, {objective}", family_beyond_halfway(units, adaptive(k, objective), tax))
                    for k, objective in searched
                ],
            )
            for tax in TAXES
        ),
    )
    yield Claim(
        LIN,
        "K = 3 is the best number of parts",
        tuple(
            Statement(
                f"Hypervolume of reward and {tax.name} beyond that",
                [
                    (
                        f"of K = {k}, {objective}",
                        _family_over(units, adaptive(3, objective), adaptive(k, objective), tax),
                    )
                    for objective in OBJECTIVES
                    for k in SEARCHED_PARTS
                    if k != 3
                ],
            )
            for tax in TAXES
        ),
    )
    rewards = [(objective, _searched(units, objective, _more_reward)) for objective in OBJECTIVES]
    trades = [(objective, _searched(units, objective, _more_volume)) for objective in OBJECTIVES]
    yield Claim(
        OURS,
        "Whatever the search makes better, the reward and the trade become better with it",
        (
            Statement(f"Mean over all K of the reward beyond that of one ratio for all{_divided(rewards)}", rewards),
            Statement(
                f"Mean over all K of the hypervolume of reward and exact match beyond it{_divided(trades)}",
                trades,
            ),
        ),
    )
    yield Claim(
        LIN,
        "Both, one ratio for all and ratios by part, help with every algorithm of preference training",
        (
            Statement(
                f"Exact match at equal reward of one ratio for all, {MEAN_RATIO}, against the front of "
                + ", ".join(AVERAGING_RIVALS),
                [(algorithm.title, _halfway_over_rivals(own, EXACT)) for algorithm, own in by_algorithm(units).items()],
            ),
            Statement(
                "Hypervolume of reward and exact match of K = 3, best answers, beyond that of one ratio for all",
                [
                    (algorithm.title, family_beyond_halfway(own, adaptive(3, "best answers"), EXACT))
                    for algorithm, own in by_algorithm(units).items()
                ],
            ),
        ),
    )


def adaptive(parts: int, objective: str) -> str:
    """The family of the ratios found for so many parts by an objective."""
    return f"adaptive, K = {parts}, {objective}"


def _tax_paid(units: Sequence[Unit], field: str, sign: int) -> Changes:
    return paired(units, lambda unit: getattr(unit.models[ADAMW], field) - getattr(unit.start, field), sign=sign)


def _path_over(units: Sequence[Unit], rival: str, tax: Tax) -> Changes:
    return paired(units, lambda unit: -from_front(unit.models[rival], unit.path, tax), (rival, UNIFORM), tax.sign)


def _third_over_adamw(units: Sequence[Unit], third: str, ratio: float, field: str, sign: int) -> Changes:
    def change(unit: Unit) -> float:
        [own] = [point for point in unit.averages[third] if point.setting == ratio]
        return getattr(own, field) - getattr(unit.models[ADAMW], field)

    return paired(units, change, (third,), sign)


def _family_over(units: Sequence[Unit], family: str, other: str, tax: Tax) -> Changes:
    def beyond(unit: Unit) -> float:
        return volume(unit, unit.family(family), tax) - volume(unit, unit.family(other), tax)

    return paired(units, beyond, (family, other))


def _monotone(units: Sequence[Unit], name: str, tax: Tax) -> Changes:
    names = (name, f"{name}, K = 8", f"{name}, K = 64")

    def worse(unit: Unit) -> float:
        online, between, offline = (tax.sign * from_front(unit.models[each], unit.path, tax) for each in names)
        return tax.sign * min(online - between, between - offline)

    return paired(units, worse, names, tax.sign)


def _searched(units: Sequence[Unit], objective: str, change: Callable[[Unit, str], float]) -> Changes:
    """The mean over K of a change that the search by an objective has made."""
    families = [adaptive(parts, objective) for parts in SEARCHED_PARTS]
    return paired(units, lambda unit: fmean(change(unit, family) for family in families), (*families, UNIFORM))


def _more_reward(unit: Unit, family: str) -> float:
    [found] = unit.averages[family]
    return found.reward - unit.halfway.reward


def _more_volume(unit: Unit, family: str) -> float:
    return beyond_halfway(unit, family, EXACT)


def _divided(items: Sequence[tuple[str, Changes]]) -> str:
    """For which objectives an improvement holds, and for which not; empty where there is no spread to judge by."""
    good, bad = ([label for label, changes in items if changes.holds is held] for held in (True, False))
    said = [
        f"{word} {', '.join(labels)}" for word, labels in (("holds for", good), ("does not hold for", bad)) if labels
    ]
    return f" ({'; '.join(said)})" if said else ""


def _halfway_over_rivals(units: Sequence[Unit], tax: Tax) -> Changes:
    """One ratio for all against the front of the rivals that it is compared with, at equal reward."""
    return paired(units, lambda unit: from_front(unit.halfway, unit.among(AVERAGING_RIVALS), tax), (UNIFORM,), tax.sign)
