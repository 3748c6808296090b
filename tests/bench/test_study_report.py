"""The account of the study: comparisons worked by hand, verdicts of every kind, and tables and pictures that stay."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "alignment_tax"))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "study"))

import comparisons
from claims import adaptive, claims
from comparisons import OPPONENTS, Changes, Key, units_of
from plan import (
    ADAMW,
    ALGORITHMS,
    CONTENDERS,
    FULL,
    OBJECTIVES,
    PART_RATIOS,
    QUICK,
    SEARCHED_PARTS,
    UNIFORM_RATIOS,
    Point,
    middle,
)
from report import TAXES
from statements import Claim, Statement
from study_report import write_report

EXACT, PERPLEXITY = TAXES
PATH, RIVALS = OPPONENTS.values()
ONE = replace(QUICK, algorithms=("dpo",))


def point(family, scores, setting=None, algorithm="dpo", seed=0, order=0, ratios=()):
    return Point(seed, order, algorithm, family, setting, *scores, 0.1, 0.2, ratios)


def start(family, scores, seed=0):
    return point(family, scores, algorithm=None, seed=seed, order=None)


BY_HAND = [
    start("base", (1.0, 0.0, 5.0)),
    start("sft", (2.0, 0.8, 6.0)),
    start("sft", (9.0, 0.9, 1.0), seed=100),  # of the tuning seed: must not count
    point(ADAMW, (9.0, 0.9, 1.0), 1.0, seed=100),
    point(ADAMW, (4.0, 0.4, 10.0), 1.0),
    point("uniform", (3.0, 0.7, 7.0), 0.5),
    point(adaptive(3, "reward"), (3.0, 0.75, 6.5), 0.5),
    point("early stop", (3.5, 0.65, 8.0), 0.5),
    point("OnDARE", (3.5, 0.6, 9.0), 4e-3),
    point("OnTIES", (5.0, 0.5, 12.0), 4e-3),
    point("Muon", (2.5, 0.9, 5.0), 1.0),
]


@pytest.fixture
def by_hand():
    return units_of(BY_HAND, ONE)


def value(changes):
    [found] = changes.values
    return pytest.approx(found)


def test_tax_at_equal_reward_by_hand(by_hand):
    def found(name, opponents, tax):
        return value(comparisons.tax_at_equal_reward(by_hand, name, opponents, tax))

    # At reward 3.5 the path lies halfway between (3, 0.7) and (4, 0.4), and between perplexities 7 and 10.
    assert found("OnDARE", PATH, EXACT) == 0.05
    assert found("OnDARE", PATH, PERPLEXITY) == 0.5
    # Past AdamW's reward AdamW counts.
    assert found("OnTIES", PATH, EXACT) == 0.1
    assert found("OnTIES", PATH, PERPLEXITY) == 2.0
    # The rivals have a point at that very reward; they have nothing beyond AdamW.
    assert found("OnDARE", RIVALS, EXACT) == -0.05
    assert found("OnDARE", RIVALS, PERPLEXITY) == 1.0
    assert found("OnTIES", RIVALS, EXACT) == 0.1
    # A rival is none of its own rivals. Muon dominates the start, and (3, 0.7) lies beyond it.
    assert found("Muon", RIVALS, EXACT) == 0.15
    # Without itself AdamW is compared with the early stop, where the others' front ends.
    assert found(ADAMW, RIVALS, EXACT) == -0.25
    assert not comparisons.tax_at_equal_reward(by_hand, ADAMW, PATH, EXACT)
    assert not comparisons.tax_at_equal_reward(by_hand, "BEMA", PATH, EXACT)


def test_reward_at_equal_tax_by_hand(by_hand):
    def found(name, opponents, tax):
        return value(comparisons.reward_at_equal_tax(by_hand, name, opponents, tax))

    # The path has exact match 0.6 a third of the way from (3, 0.7) to (4, 0.4), perplexity 9 two thirds of it.
    assert found("OnDARE", PATH, EXACT) == 3.5 - (3 + 1 / 3)
    assert found("OnDARE", PATH, PERPLEXITY) == 3.5 - (3 + 2 / 3)
    # More exact match than the start has nothing on the path: the start counts.
    assert found("Muon", PATH, EXACT) == 0.5
    # Between the early stop, (3.5, 0.65), and AdamW.
    assert found("OnDARE", RIVALS, EXACT) == 3.5 - 3.6


def test_hypervolumes_by_hand(by_hand):
    [unit] = by_hand
    # From reward 1 and exact match 0; from perplexity 20, twice that of AdamW.
    assert comparisons.own_volume(unit, "OnDARE", EXACT) == pytest.approx(1 * 0.8 + 1.5 * 0.6)
    assert comparisons.own_volume(unit, "OnDARE", PERPLEXITY) == pytest.approx(1 * 14 + 1.5 * 11)
    assert value(comparisons.volume_beyond(by_hand, "OnDARE", ADAMW, EXACT)) == 0.1
    assert value(comparisons.volume_beyond(by_hand, "OnDARE", ADAMW, PERPLEXITY)) == -3.5
    # Between start and AdamW, a point of reward 3 adds as wide a strip as one ratio for all does, and a higher one.
    assert value(comparisons.family_beyond_halfway(by_hand, adaptive(3, "reward"), EXACT)) == 0.05
    assert value(comparisons.family_beyond_halfway(by_hand, adaptive(3, "reward"), PERPLEXITY)) == 0.5
    assert not comparisons.family_beyond_halfway(by_hand, adaptive(2, "reward"), EXACT)


def test_two_contenders_are_compared_by_their_distance_from_the_path(by_hand):
    assert value(comparisons.farther(by_hand, "OnDARE", "early stop", EXACT)) == 0.05 - 0.1
    assert value(comparisons.farther(by_hand, "OnDARE", "early stop", PERPLEXITY)) == 0.5 - -0.5
    assert value(comparisons.score_beyond(by_hand, "OnDARE", ADAMW, "perplexity")) == -1.0
    assert comparisons.score_beyond(by_hand, "OnDARE", ADAMW, "perplexity").wins == 1
    assert comparisons.score_beyond(by_hand, "OnDARE", ADAMW, "reward").wins == 0


def changes(*values, sign=1, algorithms=("dpo",)):
    """Values of units: of all runs of the first algorithm, then of the next."""
    per = len(values) // len(algorithms)
    return Changes({Key(algorithms[i // per], i % per, 0): value for i, value in enumerate(values)}, sign)


CLEAR = changes(0.1, 0.2, 0.3, 0.2, 0.1, 0.3)
NOISY = changes(0.01, 0.01, 0.01, 0.01, 0.01, 2.0)  # in all units, but by one of them
SINGLE = changes(0.1, 0.2, algorithms=("dpo", "ipo"))  # two algorithms of one run


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (CLEAR, True),
        (NOISY, False),
        (changes(0.3, 0.3, 0.3, 0.3, -0.01, -0.01), False),  # in two thirds, no more
        (changes(0.3, 0.3, 0.3, 0.3, 0.3, -0.01), True),
        (changes(-0.1, -0.2, -0.3, sign=-1), True),
        (changes(-0.1, -0.2, -0.3), False),
        # Two runs, means 0.2 and 0.3: error 0.05. As four independent values their error would be 0.17.
        (changes(0.1, 0.7, 0.3, -0.1, algorithms=("dpo", "ipo")), True),
        (changes(0.1, 0.9, 0.1, -0.1, algorithms=("dpo", "ipo")), False),
        (SINGLE, None),
    ],
)
def test_when_an_improvement_holds(found, holds):
    assert found.holds is holds


def test_wins_and_words():
    assert changes(0.2, -0.1, 0.0, sign=-1).wins == 1
    assert comparisons.counted(CLEAR) == "**+0.200 ± 0.089 (6 of 6)**"
    assert comparisons.counted(changes(120.0, 80.0, -10.0)) == "+63 ± 67 (2 of 3)"
    assert comparisons.counted(changes(-0.5, sign=-1), 2) == "-0.50 (1 of 1)"
    assert comparisons.counted(changes()) == ""


@pytest.mark.parametrize(
    ("sentences", "verdict"),
    [
        ((Statement("a", [("x", CLEAR)]), Statement("b", [("y", NOISY)], decides=False)), "confirmed"),
        ((Statement("a", [("x", NOISY)]), Statement("b", [("y", CLEAR)], decides=False)), "not confirmed"),
        (
            (Statement("a", [("x", CLEAR)]), Statement("b", [("y", NOISY)])),
            "confirmed in 1 of 2 comparisons, not confirmed in the others",
        ),
        ((Statement("a", [("x", SINGLE)]), "b."), "not testable here (one run has no spread)"),
        ((Statement("a", [("x", changes())]), "b."), "not testable here"),
        (("a.", "b."), "not testable here"),
    ],
)
def test_every_kind_of_verdict(sentences, verdict):
    assert Claim("paper", "text", sentences).verdict == verdict


def test_a_statement_leaves_out_what_was_not_measured():
    assert str(Statement("a", [("x", CLEAR), ("y", changes())])) == "a: x **+0.200 ± 0.089 (6 of 6)**."
    assert str(Statement("a", [("y", changes())])) == "a: not measured."


# ---------------------------------------------------------------- all of it


def invented(size, scale=1.0, without=()):
    """Points of a whole study in which merging while training, and the search by reward, beat AdamW's path.

    Everything else lies on the path, but for `scale`: that of the reward.
    """
    points, chosen = [], {}

    def add(place, family, setting, along, gain=0.0, ratios=()):
        seed, order, algorithm = place
        shift = 0.01 * (seed % 7) + 0.003 * order  # so that no two units are alike
        scores = scale * (2 + 2 * along), 0.8 - 0.4 * along**2 + gain + shift, 6 + 5 * along**2 - 10 * gain
        points.append(point(family, scores, setting, algorithm, seed, order, ratios))

    tuned = [] if size.tuning_seed is None else [size.tuning_seed]
    for seed in (*size.seeds, *tuned):
        points.append(start("base", (scale, 0.0, 5.0), seed))
        points.append(start("sft", (2.0 * scale, 0.8 + 0.01 * (seed % 7), 6.0), seed))
    for algorithm in size.algorithms:
        fitting = [c for c in CONTENDERS.values() if c.fits(ALGORITHMS[algorithm]) and c.name not in without]
        for i, contender in enumerate(fitting):
            chosen[algorithm, contender.name] = middle(contender)
            along = 1.0 if contender.name == ADAMW else 0.5 + 0.02 * i
            gain = 0.1 if contender.group == "merging" else 0.0
            for seed in size.seeds:
                for order in size.orders:
                    add((seed, order, algorithm), contender.name, middle(contender), along, gain)
            for seed in tuned:
                for setting in contender.settings:
                    add((seed, 0, algorithm), contender.name, setting, along, gain)
        for place in ((seed, order, algorithm) for seed in size.seeds for order in size.orders):
            for ratio in UNIFORM_RATIOS:
                add(place, "uniform", ratio, ratio, ratios=(ratio,))
            for third in ("low third", "middle third", "high third"):
                for ratio in PART_RATIOS:
                    add(place, third, ratio, 0.7 + 0.2 * ratio, ratios=(ratio, 1.0, 1.0))
            for objective in OBJECTIVES:
                for parts in SEARCHED_PARTS:
                    gain = 0.02 if objective == "reward" else -0.02
                    add(place, adaptive(parts, objective), 0.5, 0.5 + 0.1 * (gain > 0), gain, (0.5,) * parts)
    return points, chosen


def test_claims_say_what_an_invented_study_has_shown():
    points, _ = invented(FULL)
    found = {claim.text: claim for claim in claims(units_of(points, FULL), FULL)}

    def verdict(beginning):
        [claim] = [claim for text, claim in found.items() if text.startswith(beginning)]
        return claim.verdict

    assert verdict("It works with every algorithm") == "confirmed"
    assert verdict("Merging while training is a better trade") == "confirmed"
    assert verdict("The tax exists") == "confirmed"
    # Both votes are alike here, and so are all K and all numbers of parts.
    assert verdict("OnTIES is a better trade with the vote") != "confirmed"
    assert verdict("Merging at every K-th step") != "confirmed"
    assert verdict("K = 3") == "not confirmed"
    # Less reward than AdamW's, but less tax.
    assert verdict("Online merging gives") == "confirmed in 8 of 10 comparisons, not confirmed in the others"
    assert verdict("Ratios by part") == "confirmed in 6 of 18 comparisons, not confirmed in the others"
    assert verdict("Its gains on models of billions") == "not testable here"
    [cause] = [claim for text, claim in found.items() if text.startswith("Whatever the search")]
    assert "(holds for reward; does not hold for likelihood, best answers)" in str(cause.sentences[1])
    for claim in found.values():
        assert all(str(sentence).endswith(".") and "nan" not in str(sentence) for sentence in claim.sentences)


def rows(text, title):
    """The cells of the first table below a title."""
    below = text[text.index(title) :].split("\n")
    first = next(i for i, line in enumerate(below) if line.startswith("|"))
    lines = []
    for line in below[first:]:
        if not line.startswith("|"):
            break
        lines.append([cell.strip() for cell in line.replace(r"\|", "").strip("|").split("|")])
    return lines


def test_the_record_of_a_whole_study_keeps_everything_and_its_bytes(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    size = replace(FULL, algorithms=("dpo", "rft"))
    # A reward of another scale; BEMA cannot be had under FSDP2, and rejection sampling has no beta.
    points, chosen = invented(size, scale=40.0, without=("BEMA",))
    files = write_report(tmp_path / "a", size, points, chosen)
    again = write_report(tmp_path / "b", size, points, chosen)
    assert [file.name for file in files] == ["table.json", "table.md", "fronts-dpo.png", "fronts-rft.png"]
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]

    content = json.loads(files[0].read_text())
    assert len(content["points"]) == len(points)
    assert {point["seed"] for point in content["points"]} == {0, 1, 2, 100}
    assert {"algorithms", "seeds"} <= set(content["size"])
    assert ["dpo", "OnDARE", 4e-3] in content["chosen"]
    assert content["versions"].keys() >= {"torch", "trl", "peft"}
    assert all(claim["verdict"] for claim in content["claims"])

    text = files[1].read_text()
    assert text.index("## Summary: exact match") < text.index("## Summary: perplexity") < text.index("## Claims")
    head, _, *lines = rows(text, "## Summary: exact match")
    assert head == ["", "DPO", "rejection sampling", "all"]
    summary = {line[0]: line[1:] for line in lines}
    assert "BEMA" not in summary
    assert summary["beta"][1] == ""
    # 0.1 beyond the path at reward 2 + 2 (0.5 + 0.02 * 14), between the ratios 0.6 and 0.8 of the path.
    between = 0.8 - 0.4 * (0.6**2 + 0.9 * (0.8**2 - 0.6**2))
    expected = 0.8 - 0.4 * 0.78**2 + 0.1 - between
    assert summary["OnDARE"][0] == f"**+{expected:.3f} ± 0.000 (6 of 6)**"
    assert summary["OnDARE"][2].endswith("(12 of 12)**")
    for line in text.split("\n"):
        assert "nan" not in line.split("|")
    tables = [
        rows(text[i:], "") for i in range(len(text)) if text.startswith("\n## ", i) and "Claims" not in text[i : i + 12]
    ]
    assert all(len({len(line) for line in table}) == 1 for table in tables)
    tried = rows(text, "DPO: all settings tried, on seed 100")
    assert [line[2] for line in tried if line[0] == "OnTIES"] == ["0.0015", "0.004", "0.01"]
    assert [line[2] for line in tried if line[0] == "OnTIES" and line[-1] == "yes"] == ["0.004"]


def test_a_quick_run_has_no_spread_and_no_verdict(tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    points, chosen = invented(QUICK)
    files = write_report(tmp_path, QUICK, points, chosen)
    assert [file.name for file in files] == ["table.json", "table.md", "fronts-dpo.png", "fronts-grpo.png"]
    assert all(file.read_bytes()[:4] == b"\x89PNG" for file in files[2:])
    content, text = json.loads(files[0].read_text()), files[1].read_text()
    assert {claim["verdict"].partition(" (")[0] for claim in content["claims"]} == {"not testable here"}
    assert "One run has no spread" in text
    assert "No setting was chosen" in text
    assert "all settings tried" not in text
    model = {line[0]: line for line in rows(text, "## DPO: models")}
    assert model["start"][2:5] == ["2.00", "0.800", "6.00"]
    assert model["AdamW"][2:5] == ["4.00", "0.400", "11.00"]
