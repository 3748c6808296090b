"""The experiment of averaging by depth: that it runs, and the arithmetic of its report."""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "alignment_tax"))
sys.path.insert(0, str(Path(__file__).parents[2] / "bench" / "adaptive_averaging"))

import experiment
import fronts
from averaging import UNIFORM, Point, adaptive, one_part
from experiment import FULL, QUICK, parse_arguments
from report import TAXES

SCRIPT = Path(__file__).parents[2] / "bench" / "adaptive_averaging" / "run.py"
EXACT, PERPLEXITY = TAXES
THIRDS = ["low third alone", "middle third alone", "high third alone"]
FAMILIES = ["uniform", *THIRDS, "adaptive, K = 2", "adaptive, K = 3", "adaptive, K = 4"]
FEW = {"base_steps": 6, "sft_steps": 6, "dpo_steps": 2, "prompts": 8, "answers": 8}
TINY = replace(QUICK, layers=4, searched=(2, 3, 4), examined_prompts=2, **FEW)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folders of two quick runs, smaller still, and what the first one printed."""
    pytest.importorskip("trl")
    outs = [tmp_path_factory.mktemp("run") for _ in range(2)]
    printed, threads = [], torch.get_num_threads()
    try:
        # The script chooses environment and threads for a process of its own; here, threads that spin would be slow.
        torch.set_num_threads(1)
        keep_threads = patch.object(torch, "set_num_threads")
        with patch.dict(os.environ), patch.object(experiment, "QUICK", TINY), keep_threads:
            for out in outs:
                arguments = [str(SCRIPT), "--quick", "--out", str(out)]
                with redirect_stdout(io.StringIO()) as text, patch.object(sys, "argv", arguments):
                    runpy.run_path(str(SCRIPT), run_name="__main__")
                printed.append(text.getvalue())
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    return SimpleNamespace(out=outs[0], again=outs[1], printed=printed[0])


def test_a_quick_run_measures_every_family(quick):
    content = json.loads((quick.out / "table.json").read_text())
    assert list(dict.fromkeys(point["family"] for point in content["points"])) == FAMILIES
    assert len(content["points"]) == TINY.points
    for tax in TAXES:
        assert list(content["hypervolumes"][tax.field]) == FAMILIES
    table = (quick.out / "table.md").read_text()
    assert table in quick.printed
    assert "of processor time" in quick.printed
    assert all(f"| {family} |" in table for family in FAMILIES)
    found = {(point["family"], point["ratio"]): point["ratios"] for point in content["points"]}
    assert found["uniform", 0.4] == [0.4]
    assert found["middle third alone", 0.0] == [1.0, 0.0, 1.0]
    for parts in TINY.searched:
        ratios = found[f"adaptive, K = {parts}", 0.4]
        assert len(ratios) == parts
        assert sum(ratios) / parts == pytest.approx(0.4, abs=1e-9)
        assert len(set(ratios)) > 1, "the search has not moved"


def test_two_runs_agree_to_the_last_bit(quick):
    for name in ("table.json", "table.md", "fronts.png"):
        assert (quick.out / name).read_bytes() == (quick.again / name).read_bytes()


def test_a_quick_run_is_not_recorded(capsys):
    assert (parse_arguments("", ["--record"]).setting, parse_arguments("", ["--quick"]).setting) == (FULL, QUICK)
    with pytest.raises(SystemExit):
        parse_arguments("", ["--quick", "--record"])
    assert "a quick run means nothing; leave out --quick or --record" in capsys.readouterr().err


def point(family: str, ratio: float, reward: float, exact_match: float, perplexity: float = 10.0) -> Point:
    return Point(0, family, ratio, (ratio,), reward, exact_match, perplexity, 1.0)


# One ratio for all: 0, 0.4 and 1; the search is better at its mean ratio, and the low third is worse than `rlhf`.
POINTS = [
    point(UNIFORM, 0.0, 2.0, 0.8),
    point(UNIFORM, 0.4, 3.0, 0.6),
    point(UNIFORM, 1.0, 3.5, 0.2),
    point(adaptive(3), 0.4, 3.2, 0.7, 9.0),
    point(one_part("low"), 0.0, 3.0, 0.1, 12.0),
]


def test_hypervolumes_and_what_they_gain_by_hand():
    # From (1, 0): 1 x 0.8, then 1 more reward at 0.6, then 0.5 more at 0.2.
    assert fronts.volumes(POINTS, QUICK, UNIFORM, EXACT) == pytest.approx([1.5])
    # 1 x 0.8, then 1.2 at 0.7, then 0.3 at 0.2.
    assert fronts.volumes(POINTS, QUICK, adaptive(3), EXACT) == pytest.approx([1.7])
    assert fronts.gains(POINTS, QUICK, adaptive(3), EXACT) == pytest.approx([0.2])
    # The low third's own model is beaten by `rlhf`: what stays are the two trained models.
    assert fronts.gains(POINTS, QUICK, one_part("low"), EXACT) == pytest.approx([0.8 + 1.5 * 0.2 - 1.5])
    # Down from perplexity 20: 2.5 x 10 of one ratio for all, and 2.2 x 1 beyond it.
    assert fronts.gains(POINTS, QUICK, adaptive(3), PERPLEXITY) == pytest.approx([2.2])


def test_a_family_counts_the_trained_models_and_as_many_others_as_it_has():
    # A ratio that is measured for the line alone, and not a mean ratio of the search.
    points = [*POINTS, point(UNIFORM, 0.9, 3.6, 0.9)]
    assert fronts.volumes(points, QUICK, UNIFORM, EXACT) == pytest.approx([1.5])


def test_differences_at_equal_reward_by_hand():
    found, low = POINTS[3:]
    # At reward 3.2 one ratio for all has 0.6 - 0.4 * 0.4.
    assert fronts.at_equal_reward(POINTS, found, EXACT) == pytest.approx(0.7 - 0.44)
    assert fronts.at_equal_reward(POINTS, low, EXACT) == pytest.approx(0.1 - 0.6)
    # All of the line has perplexity 10: only its end with the highest reward is on the front.
    assert fronts.at_equal_reward(POINTS, found, PERPLEXITY) == pytest.approx(-1.0)


def test_families_are_paired_within_a_seed():
    other = Point(1, UNIFORM, 0.4, (0.4,), 2.5, 0.5, 10.0, 1.0)
    [(own, plain)] = fronts.paired([other, *POINTS], adaptive(3), 0.4, 0.4)
    assert (own.seed, plain.seed, plain.reward) == (0, 0, 3.0)
