"""Sweeps: every ratio scored once, whatever happens in between, and what the report says of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import llama, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PreTrainedTokenizerFast

from fused_merge.interpolation.interpolate import interpolate
from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.sweep import plots
from fused_merge.sweep.evaluate import evaluate_ratios, sweep_checkpoints
from fused_merge.sweep.plots import Mark
from fused_merge.sweep.report import write_report
from fused_merge.sweep.results import ScoredRatio, read_results
from fused_merge.sweep.scorers import HarnessTask, ImportedScorer


def linear(value: float) -> nn.Linear:
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.fixture
def line():
    """A model that is 7 everywhere, on the line from 0 to 1: its mean is the ratio."""
    return RatioSweep(linear(7.0), linear(0.0), linear(1.0))


def mean(model):
    return model.weight.detach().mean()


def results_of(out):
    return json.loads((out / "results.json").read_text())


def write_results(folder, scores, minimize=(), lower=()):
    """A finished sweep of some ratios: {label: {score: value}}."""
    folder.mkdir()
    names = list(next(iter(scores.values())))
    content = {
        "sweep": {"checkpoints": {}, "ratios": dict.fromkeys(scores, 0.0), "scorers": names},
        "minimize": list(minimize),
        "lower_is_better": list(lower),
        "rows": [{"label": label, "ratio": 0.0, "scores": row} for label, row in scores.items()],
    }
    (folder / "results.json").write_text(json.dumps(content))
    return folder / "results.json"


# --- scoring


def test_a_number_may_come_with_a_gradient(line, tmp_path):
    (row,) = evaluate_ratios(line, [0.5], {"mean": lambda model: model.weight.mean()}, tmp_path)
    assert row.scores == {"mean": 0.5}


def test_every_ratio_is_scored_at_its_own_weights(line, tmp_path):
    out = tmp_path / "new" / "out"
    rows = evaluate_ratios(
        line, [0, 0.25, 1.5], {"mean": mean, "parts": lambda model: {"twice": 2 * mean(model), "one": 1}}, out
    )
    assert rows == [
        ScoredRatio("0", 0.0, {"mean": 0.0, "parts/twice": 0.0, "parts/one": 1.0}),
        ScoredRatio("0.25", 0.25, {"mean": 0.25, "parts/twice": 0.5, "parts/one": 1.0}),
        ScoredRatio("1.5", 1.5, {"mean": 1.5, "parts/twice": 3.0, "parts/one": 1.0}),
    ]
    assert line.model.weight.tolist() == [[7.0] * 3]
    assert read_results(out / "results.json").finished == rows
    document = results_of(out)
    assert document["sweep"] == {
        "checkpoints": {},
        "ratios": {"0": 0.0, "0.25": 0.25, "1.5": 1.5},
        "scorers": ["mean", "parts"],
    }
    assert (document["front"], document["knee"], document["hypervolume"]) == (["1.5"], "1.5", 0.0)
    assert document["reference"] == {"mean": 0.0, "parts/twice": 0.0, "parts/one": 1.0}
    assert [path.name for path in out.iterdir()] == ["results.json"]


def test_ratios_with_labels_reach_the_model_as_they_are(tmp_path):
    asked = []

    class Recorder:
        @contextmanager
        def at(self, ratio):
            asked.append(ratio)
            yield None

        def move_to(self, ratio):
            asked.append(ratio)

    ratios = {"half": 0.5, "by layer": {"lower.*": 0.1, ".*": 1}, "third": 1 / 3}
    rows = evaluate_ratios(Recorder(), ratios, {"one": lambda model: 1.0}, tmp_path)
    assert asked == [0.5, {"lower.*": 0.1, ".*": 1.0}, 1 / 3]
    assert [(row.label, row.ratio) for row in rows] == list(ratios.items())
    assert evaluate_ratios(Recorder(), ratios, {"one": lambda model: 2.0}, tmp_path) == rows
    assert len(asked) == 3


def test_the_models_own_weights_are_put_aside_and_back_once(line, tmp_path, monkeypatch):
    entered, at = [], RatioSweep.at
    monkeypatch.setattr(RatioSweep, "at", lambda self, ratio: entered.append(ratio) or at(self, ratio))
    rows = evaluate_ratios(line, [0.25, 0.5, 1], {"mean": mean}, tmp_path)
    assert [row.scores["mean"] for row in rows] == [0.25, 0.5, 1]
    assert entered == [0.25]
    assert line.model.weight.tolist() == [[7.0] * 3]


def test_a_ratio_that_does_not_fit_the_model_keeps_the_finished_ones(line, tmp_path):
    with pytest.raises(ValueError, match="ratio key 'bias' matches no tensor"):
        evaluate_ratios(line, {"half": 0.5, "odd": {"bias": 0.1, ".*": 0.2}}, {"mean": mean}, tmp_path)
    assert line.model.weight.tolist() == [[7.0] * 3]
    assert [row["label"] for row in results_of(tmp_path)["rows"]] == ["half"]


def test_labels_of_numbers_tell_them_apart(line, tmp_path):
    rows = evaluate_ratios(line, [-0.0, 0.1, 0.1 + 0.2, 0.3, 1e-9, 2], {"mean": mean}, tmp_path)
    assert [row.label for row in rows] == ["0", "0.1", "0.30000000000000004", "0.3", "1e-09", "2"]


def test_a_ratio_is_on_the_disk_before_the_next_one_is_scored(line, tmp_path):
    seen = []

    def scorer(model):
        seen.append([row["label"] for row in results_of(tmp_path)["rows"]])
        assert "front" not in results_of(tmp_path)
        return 1.0

    evaluate_ratios(line, [0, 0.5, 1], {"scorer": scorer}, tmp_path)
    assert seen == [[], ["0"], ["0", "0.5"]]
    assert results_of(tmp_path)["front"] == ["0", "0.5", "1"]


def test_every_scorer_draws_the_same_numbers_and_the_caller_other_ones(line, tmp_path):
    def draws(model=None):
        return {"python": random.random(), "numpy": np.random.rand(), "torch": torch.rand(())}

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    expected = draws()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    first, second = evaluate_ratios(line, [0, 1], {"a": draws, "b": draws}, tmp_path)
    assert first.scores == second.scores
    assert [first.scores[f"a/{key}"] for key in expected] == [first.scores[f"b/{key}"] for key in expected]
    assert draws() == expected


# --- killed, and going on

KILLED = """
import os, random, signal, sys
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from torch import nn
from fused_merge.interpolation.interpolate import interpolate
from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.sweep.evaluate import evaluate_ratios

folder, out, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
model = nn.Linear(3, 1, bias=False)

def scorer(model):
    ratio = float(model.weight.mean())
    print(ratio, flush=True)
    if ratio == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"noisy": ratio + torch.rand(()), "other": random.random() - np.random.rand()}

ends = {role: folder / f"{role}.safetensors" for role in ("base", "tuned")}
sweep = RatioSweep(model, *ends.values())
ratios = [0, 0.25, 0.5, 0.75, 1]
evaluate_ratios(sweep, ratios, {"s": scorer}, out, checkpoints=ends, minimize=["s/other"])
"""


def test_a_killed_sweep_goes_on_and_ends_as_one_that_was_not(tmp_path):
    for role, value in (("base", 0.0), ("tuned", 1.0)):
        save_file({"weight": torch.full((1, 3), value)}, tmp_path / f"{role}.safetensors")

    def run(out, kill_at):
        command = [sys.executable, "-c", KILLED, tmp_path, tmp_path / out, str(kill_at)]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True)

    assert run("whole", -1).returncode == 0
    killed = run("killed", 0.5)
    assert (killed.returncode, killed.stdout.split()) == (-signal.SIGKILL, ["0.0", "0.25", "0.5"])
    assert [row["label"] for row in results_of(tmp_path / "killed")["rows"]] == ["0", "0.25"]
    again = run("killed", -1)
    assert (again.returncode, again.stdout.split()) == (0, ["0.5", "0.75", "1.0"])
    assert (tmp_path / "killed/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


def test_the_same_ratios_in_another_order_are_the_same_sweep(line, tmp_path):
    def until_half(model):
        if mean(model) == 0.5:
            raise KeyboardInterrupt
        return mean(model)

    with pytest.raises(KeyboardInterrupt):
        evaluate_ratios(line, [0, 1, 0.5, 2], {"mean": until_half}, tmp_path)
    rows = evaluate_ratios(line, [2, 1, 0.5, 0], {"mean": mean}, tmp_path)
    assert [row.ratio for row in rows] == [row["ratio"] for row in results_of(tmp_path)["rows"]] == [2, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("ratios", "scorers", "other"),
    [
        ([0, 0.5], ["mean"], "ratios"),
        ({"0": 0.0, "1": 2.0}, ["mean"], "ratios"),
        ([0, 1], ["mean", "sum"], "scorers"),
        ([0], ["sum"], "ratios and scorers"),
    ],
)
def test_another_sweep_does_not_go_on(ratios, scorers, other, line, tmp_path):
    evaluate_ratios(line, [0, 1], {"mean": mean}, tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    message = (
        f"results.json holds the results of a sweep with other {other}; choose another folder, or delete it to begin"
    )
    with pytest.raises(ValueError, match=message):
        evaluate_ratios(line, ratios, dict.fromkeys(scorers, mean), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_results_of_other_checkpoints_are_not_taken_for_these(line, tmp_path):
    base = tmp_path / "base.safetensors"
    save_file({"w": torch.zeros(3)}, base)

    def sweep(**checkpoints):
        return evaluate_ratios(line, [0, 1], {"mean": mean}, tmp_path / "out", checkpoints=checkpoints)

    sweep(base=base)
    assert len(sweep(base=base)) == 2
    # Trained again: the same path and size.
    save_file({"w": torch.ones(3)}, base)
    os.utime(base, ns=(0, 10**18))
    with pytest.raises(ValueError, match="a sweep with other checkpoints"):
        sweep(base=base)
    with pytest.raises(ValueError, match="a sweep with other checkpoints"):
        sweep()


def test_a_sweep_without_a_finished_ratio_is_in_nobodys_way(line, tmp_path):
    def fail(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_ratios(line, [0, 1], {"fail": fail}, tmp_path)
    assert line.model.weight.tolist() == [[7.0] * 3]
    assert results_of(tmp_path)["rows"] == []
    assert len(evaluate_ratios(line, [0.5], {"mean": mean}, tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError: .*"),
        ("[]", "TypeError: .*"),
        ('{"rows": []}', "KeyError: 'sweep'"),
        (
            '{"sweep": {}, "minimize": [], "lower_is_better": [], "rows": [{"label": "0", "ratio": 0}]}',
            "KeyError: 'scores'",
        ),
        (
            '{"sweep": {}, "minimize": [], "lower_is_better": [], '
            '"rows": [{"label": "0", "ratio": 0, "scores": {"a": NaN}}]}',
            "ValueError: Out of range float values are not JSON compliant",
        ),
    ],
)
def test_a_file_that_holds_no_results(text, reason, line, tmp_path):
    (tmp_path / "results.json").write_text(text)
    message = rf"results.json holds no results of a sweep \({reason}\); give another file, or delete it"
    with pytest.raises(ValueError, match=message):
        evaluate_ratios(line, [0, 1], {"mean": mean}, tmp_path)
    assert (tmp_path / "results.json").read_text() == text


# --- scorers that fail


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (float("nan"), "returned nan, which is no finite number"),
        (torch.tensor(float("inf")), r"returned tensor\(inf\), which is no finite number"),
        (None, "returned None, which is no finite number"),
        ("0.5", "returned '0.5', which is no finite number"),
        (torch.ones(2), r"returned tensor\(\[1., 1.\]\), which is no finite number"),
        ({"a": 1, "b": float("nan")}, "returned nan for 'b', which is no finite number"),
        ({}, "returned no score"),
        (ZeroDivisionError("by zero"), "raised ZeroDivisionError: by zero"),
        (AssertionError(), "raised AssertionError"),
    ],
)
def test_a_scorer_that_fails_half_way(answer, sentence, line, tmp_path):
    def fails(model):
        if mean(model) < 0.5:
            return {"a": 1, "b": 2} if isinstance(answer, dict) else 1
        if isinstance(answer, Exception):
            raise answer
        return answer

    scorers = {"mean": mean, "fails": fails}
    kept = rf"correct it and run the same again \(2 of 4 ratios are finished and kept in {tmp_path}/results.json\)"
    with pytest.raises(RuntimeError, match=f"scorer 'fails' at ratio 0.5 {sentence}; {kept}"):
        evaluate_ratios(line, [0, 0.25, 0.5, 0.75], scorers, tmp_path)
    assert line.model.weight.tolist() == [[7.0] * 3]
    assert [row["label"] for row in results_of(tmp_path)["rows"]] == ["0", "0.25"]
    # Corrected, it goes on from there.
    asked = []

    def corrected(model):
        asked.append(float(mean(model)))
        return {"b": 2, "a": 1} if isinstance(answer, dict) else 1

    rows = evaluate_ratios(line, [0, 0.25, 0.5, 0.75], {"mean": mean, "fails": corrected}, tmp_path)
    assert asked == [0.5, 0.75]
    assert [row.scores["mean"] for row in rows] == [0, 0.25, 0.5, 0.75]
    # In the order of the first ratio, whatever the order of the answers.
    assert len({tuple(row.scores) for row in rows}) == 1


def test_a_direction_that_a_scorer_told_once_is_kept(line, tmp_path):
    def tax(model):
        tax.lower_is_better = {"x"} if mean(model) == 0 else set()
        return {"x": mean(model)}

    evaluate_ratios(line, [0, 1], {"tax": tax}, tmp_path)
    assert results_of(tmp_path)["lower_is_better"] == ["tax/x"]


def test_scores_that_change_between_ratios(line, tmp_path):
    message = r"the scores at ratio 1 are 's/1.0' and were 's/0.0' before; .* \(1 of 2 ratios are finished"
    with pytest.raises(RuntimeError, match=message):
        evaluate_ratios(line, [0, 1], {"s": lambda model: {mean(model).item(): 1.0}}, tmp_path)


def test_two_scorers_with_one_score(line, tmp_path):
    with pytest.raises(RuntimeError, match="scorer 'a/b' at ratio 0 returned 'a/b' as another scorer does; rename one"):
        evaluate_ratios(line, [0], {"a": lambda model: {"b": 1.0}, "a/b": mean}, tmp_path)


# --- what is refused


@pytest.mark.parametrize(
    ("ratios", "error", "message"),
    [
        ([], ValueError, "ratios is empty; give at least one"),
        ({}, ValueError, "ratios is empty; give at least one"),
        (0.3, TypeError, r"ratios must be a sequence, got 0.3; write \[0.3\]"),
        ([0.1, 0.1], ValueError, "ratio 0.1 is given twice; leave one out"),
        ([float("nan")], ValueError, "a ratio must be finite, got nan"),
        ([{"w": 0.5}], TypeError, "a ratio must be a number, got {'w': 0.5}"),
        ({"mixed": {"w": "x"}}, TypeError, "a ratio of 'w' must be a number, got 'x'"),
        ({0.5: 0.5}, TypeError, "a label of a ratio must be text, got 0.5; write '0.5'"),
    ],
)
def test_ratios_that_are_none(ratios, error, message, line, tmp_path):
    with pytest.raises(error, match=message):
        evaluate_ratios(line, ratios, {"mean": mean}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_no_scorer(line, tmp_path):
    with pytest.raises(ValueError, match="there is no scorer; give at least one function of the model"):
        evaluate_ratios(line, [0], {}, tmp_path)


def test_a_score_to_minimize_that_there_is_not(line, tmp_path):
    asked = []

    def scorer(model):
        asked.append(1)
        return {"a": 1.0}

    with pytest.raises(ValueError, match="minimize names 'tax', which is no score of 's'; correct it"):
        evaluate_ratios(line, [0, 1], {"s": scorer}, tmp_path, minimize=["tax"])
    assert not asked
    for minimize in (["s"], ["s/b"]):
        with pytest.raises(ValueError, match=f"minimize names '{minimize[0]}', but the scores are 's/a'; correct it"):
            evaluate_ratios(line, [0, 1], {"s": scorer}, tmp_path, minimize=minimize)
    # Known after the first ratio, which is kept.
    assert len(asked) == 1
    evaluate_ratios(line, [0, 1], {"s": scorer}, tmp_path, minimize=["s/a"])
    assert len(asked) == 2


def test_a_direction_may_be_changed_without_scoring_again(line, tmp_path):
    evaluate_ratios(line, [0, 1], {"mean": mean}, tmp_path)
    assert results_of(tmp_path)["front"] == ["1"]
    evaluate_ratios(line, [0, 1], {"mean": None}, tmp_path, minimize=["mean"])
    assert results_of(tmp_path)["front"] == ["0"]
    evaluate_ratios(line, [0, 1], {"mean": None}, tmp_path)
    assert results_of(tmp_path)["front"] == ["1"]


def test_a_folder_that_cannot_be_written_to_is_known_before_anything_is_scored(line, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match=r"cannot write .*out/results.json: .*; nothing of it is left"):
        evaluate_ratios(line, [0], {"mean": pytest.fail}, tmp_path / "out")


# --- the report


def test_the_table_by_hand(tmp_path):
    write_results(
        tmp_path / "line",
        {
            "0": {"reward": 0.0, "tax|x": 1.0},
            "0.5": {"reward": 6.0, "tax|x": 2.0},
            "0.7": {"reward": 5.0, "tax|x": 2.5},
            "0.8": {"reward": 8.0, "tax|x": 6.0},
            "1": {"reward": 10.123456789, "tax|x": 11.0},
        },
        minimize=["tax|x"],
    )
    files = write_report(tmp_path / "line")
    assert [file.name for file in files] == ["results.json", "results.md", "pareto.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    # 6 x 9 + 2 x 5, and nothing of what is as bad as the worst.
    assert files[1].read_text(encoding="utf-8") == (
        "# Ratios of line\n\n"
        "↑ more is better, ↓ less is better. On the *front* are the ratios that no other one of the same sweep "
        "dominates; at the *knee* it bends most, each score scaled to [0, 1] over the front. "
        "The *hypervolume* is measured from the worst of each score (reward 0, tax|x 11).\n\n"
        "Hypervolume 64, knee at 0.5.\n\n"
        "| ratio | reward ↑ | tax\\|x ↓ |  |\n"
        "| --- | --- | --- | --- |\n"
        "| 0 | 0 | 1 | front |\n"
        "| 0.5 | 6 | 2 | knee |\n"
        "| 0.7 | 5 | 2.5 |  |\n"
        "| 0.8 | 8 | 6 | front |\n"
        "| 1 | 10.1235 | 11 | front |\n"
    )


def test_several_sweeps_in_one_report(tmp_path):
    write_results(tmp_path / "adamw", {"0": {"reward": 0.0, "tax": 9.0}, "1": {"reward": 4.0, "tax": 10.0}}, ["tax"])
    # Scored in another order, and with no word on the direction of its own.
    other = write_results(tmp_path / "ondare", {"a": {"tax": 8.0, "reward": 3.0}, "b": {"tax": 10.0, "reward": 4.0}})
    text = write_report(tmp_path / "adamw", [other])[1].read_text(encoding="utf-8")
    assert "(reward 0, tax 10)" in text
    assert (
        "| sweep | hypervolume | knee | front | of these on the front of all sweeps |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| adamw | 0 | 1 | 0, 1 | 1 |\n"
        "| ondare | 6 | b | a, b | a, b |\n"
    ) in text
    assert "## ondare\n\n| ratio | reward ↑ | tax ↓ |  |\n| --- | --- | --- | --- |\n| a | 3 | 8 | front |\n" in text
    # Folders of one name are told apart by their paths.
    (tmp_path / "x").mkdir()
    twin = write_results(tmp_path / "x" / "adamw", {"0": {"reward": 0.0, "tax": 9.0}})
    assert f"| {twin} |" in write_report(tmp_path / "adamw", [twin])[1].read_text(encoding="utf-8")


def test_sweeps_that_cannot_be_compared(tmp_path):
    main = write_results(tmp_path / "main", {"0": {"reward": 0.0, "tax": 9.0}})
    other = write_results(tmp_path / "other", {"0": {"reward": 0.0, "loss": 9.0}})
    message = f"{other} has the scores 'reward', 'loss' and {main} has 'reward', 'tax'; compare sweeps with"
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "main", [other])
    empty = tmp_path / "empty.json"
    empty.write_text('{"sweep": {}, "minimize": [], "lower_is_better": [], "rows": []}')
    with pytest.raises(ValueError, match=r"empty\.json has no finished ratio yet; run that sweep first"):
        write_report(tmp_path / "main", [empty])


def test_one_score_makes_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_results(tmp_path / "line", {"0": {"loss": 2.0}, "1": {"loss": 1.0}}, lower=["loss"])
    files = write_report(tmp_path / "line")
    assert [file.name for file in files] == ["results.json", "results.md"]
    assert "Hypervolume 1, knee at 1." in files[1].read_text(encoding="utf-8")


def test_volumes_of_many_scores_are_left_out(line, tmp_path):
    def scorer(model):
        return {str(i): mean(model) ** i for i in range(5)}

    evaluate_ratios(line, [0, 1], {"s": scorer}, tmp_path)
    assert results_of(tmp_path)["hypervolume"] is None
    assert "Hypervolume not computed (more than 4 scores), knee at 1." in write_report(tmp_path)[1].read_text()


def test_a_picture_without_matplotlib(tmp_path, monkeypatch):
    write_results(tmp_path / "line", {"0": {"a": 2.0, "b": 1.0}})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pareto.png needs matplotlib: pip install 'fused_merge\[plots\]'"):
        write_report(tmp_path / "line")
    assert (tmp_path / "line" / "results.md").exists()


# --- the picture

SWEEPS = {
    "one": [Mark("0", 1.0, 9.0), Mark("0.5", 3.0, 5.0), Mark("1", 2.0, 7.0)],
    "cost in $\\no$": [Mark("$a", 4.0, 8.0), Mark("b", 3.0, 4.0), Mark("c", 2.0, 8.0)],
}


def test_a_picture_shows_every_point_its_label_and_each_front():
    figure = plots.fronts(SWEEPS, ("reward", "tax"), maximize=(True, False))
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["one"] == [[3.0, 5.0]]
    assert drawn["cost in $\\no$"] == [[3.0, 4.0], [4.0, 8.0]]
    points = sorted(tuple(point) for line in axes.lines for point in line.get_xydata())
    assert points == sorted((mark.x, mark.y) for marks in SWEEPS.values() for mark in marks)
    assert sorted(text.get_text() for text in axes.texts) == sorted(m.label for ms in SWEEPS.values() for m in ms)
    assert {text.get_text(): text.xy for text in axes.texts}["0.5"] == (3.0, 5.0)
    assert (axes.xaxis.get_inverted(), axes.yaxis.get_inverted()) == (False, True)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("reward", "tax (axis reversed)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(SWEEPS)


def test_the_same_picture_is_the_same_file(tmp_path):
    for name in "ab":
        plots.draw_fronts(tmp_path / name, SWEEPS, ("reward", "$tax"), maximize=(False, True))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# --- checkpoints and scorers by name


@pytest.fixture
def ends(tmp_path):
    """Two small models with a tokenizer."""
    folders = [save(llama(seed), tmp_path / name) for seed, name in enumerate(("base", "tuned"))]
    words = Tokenizer(WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folders[1])
    return folders


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Write modules into the working directory, to be forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def test_checkpoints_are_scored_by_functions_of_a_module(ends, module, tmp_path):
    module(
        "my_scores",
        "import torch\n"
        "def total(model):\n"
        "    assert not model.training and not any(p.requires_grad for p in model.parameters())\n"
        "    return sum(p.double().sum() for p in model.parameters())\n"
        "def unknown(model, tokenizer, batch=8):\n"
        "    ids = tokenizer('a b c', return_tensors='pt')['input_ids']\n"
        "    assert ids.tolist() == [[1, 2, 0]]\n"
        "    return model(ids, labels=ids).loss\n",
    )
    files = sweep_checkpoints(
        *ends, [0, 0.3], tmp_path / "out", scorers=["my_scores:total", "my_scores:unknown"], minimize=["unknown"]
    )
    assert [file.name for file in files] == ["results.json", "results.md", "pareto.png"]
    rows = read_results(files[0]).finished
    points = interpolate(llama(0).state_dict(), llama(1).state_dict(), [0.0, 0.3])
    model = llama(2)
    for row, point in zip(rows, points, strict=True):
        model.load_state_dict(point)
        assert row.scores["total"] == pytest.approx(sum(p.double().sum().item() for p in model.parameters()))
        ids = torch.tensor([[1, 2, 0]])
        assert row.scores["unknown"] == model(ids, labels=ids).loss.item()
    belongs_to = results_of(tmp_path / "out")["sweep"]
    assert (belongs_to["scorers"], belongs_to["dtype"]) == (["my_scores:total", "my_scores:unknown"], "float32")
    # A function of the same name in another module is another scorer.
    module("others", "def total(model):\n    return 1\ndef unknown(model):\n    return 1\n")
    with pytest.raises(ValueError, match="a sweep with other scorers"):
        sweep_checkpoints(*ends, [0, 0.3], tmp_path / "out", scorers=["others:total", "others:unknown"])
    assert set(results_of(tmp_path / "out")["sweep"]["checkpoints"]) == {"base", "tuned"}


def test_a_finished_sweep_loads_no_model_again(ends, module, tmp_path, monkeypatch):
    module("ones", "def one(model):\n    return 1\ndef two(model):\n    return 2\n")
    options = {"scorers": ["ones:one", "ones:two"]}
    sweep_checkpoints(*ends, [0, 1], tmp_path / "out", **options)
    (tmp_path / "out" / "pareto.png").unlink()
    monkeypatch.setattr("fused_merge.sweep.evaluate.load_model", pytest.fail)
    assert sweep_checkpoints(*ends, [0, 1], tmp_path / "out", **options)[2].exists()


def test_the_model_has_the_dtype_of_the_files_whatever_its_configuration_says(ends, module, tmp_path):
    module("dtypes", "def size(model):\n    return model.dtype.itemsize\n")
    for folder in ends:
        weights = load_file(folder / "model.safetensors")
        save_file({name: w.bfloat16() for name, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert json.loads((ends[1] / "config.json").read_text())["dtype"] == "float32"
    files = sweep_checkpoints(*ends, [0.5], tmp_path / "out", scorers=["dtypes:size"])
    assert read_results(files[0]).finished[0].scores == {"size": 2.0}


def test_the_model_may_have_another_dtype_than_the_files(ends, module, tmp_path):
    module("first", "def weight(model):\n    assert model.dtype.itemsize == 2\n    return model.lm_head.weight[0, 0]\n")
    files = sweep_checkpoints(*ends, [0, 0.3, 1], tmp_path / "out", scorers=["first:weight"], dtype="bfloat16")
    points = interpolate(llama(0).state_dict(), llama(1).state_dict(), [0, 0.3, 1])
    assert [row.scores["weight"] for row in read_results(files[0]).finished] == [
        point["lm_head.weight"][0, 0].bfloat16().item() for point in points
    ]
    # Another dtype is another sweep.
    with pytest.raises(ValueError, match="a sweep with other dtype"):
        sweep_checkpoints(*ends, [0, 0.3, 1], tmp_path / "out", scorers=["first:weight"])


@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("scores", ValueError, "'scores' is no scorer; write module:function, such as scores:reward"),
        ("scores:", ValueError, "'scores:' is no scorer"),
        (":reward", ValueError, "':reward' is no scorer"),
        ("nowhere:reward", ImportError, r"scorer 'nowhere:reward' cannot be imported \(ModuleNotFoundError: No module"),
        (
            "broken:reward",
            ImportError,
            r"scorer 'broken:reward' cannot be imported \(SyntaxError: .*; correct its module",
        ),
        (
            "fine:other",
            ValueError,
            r"module 'fine' \(.*fine.py\) has no function 'other'; correct the scorer 'fine:other'",
        ),
        ("fine:number", ValueError, r"module 'fine' \(.*fine.py\) has no function 'number'"),
        (
            "fine:nothing",
            ValueError,
            r"scorer 'fine:nothing' takes \(\); let it take \(model\) or \(model, tokenizer\)",
        ),
        ("fine:three", ValueError, r"scorer 'fine:three' takes \(model, tokenizer, data\)"),
    ],
)
def test_scorers_that_cannot_be_had(text, error, sentence, module):
    module("broken", "def reward(:")
    module("fine", "number = 3\ndef nothing(): pass\ndef three(model, tokenizer, data): pass\n")
    with pytest.raises(error, match=sentence):
        ImportedScorer(text)


@pytest.mark.parametrize(
    ("parameters", "takes_tokenizer"),
    [
        ("model", False),
        ("model, tokenizer", True),
        ("model, words", True),
        ("model, tokenizer=None", True),
        ("model, batch=8", False),
        ("model, *, batch=8", False),
    ],
)
def test_a_scorer_gets_what_its_signature_asks_for(parameters, takes_tokenizer, module):
    module("asks", f"def scorer({parameters}):\n    return list(locals().values())\n")
    scorer = ImportedScorer("asks:scorer")
    assert (scorer.name, scorer.takes_tokenizer) == ("scorer", takes_tokenizer)
    scorer.tokenizer = "T"
    answer = scorer("M")
    assert answer[0] == "M"
    assert ("T" in answer) == takes_tokenizer


def test_what_is_known_before_a_model_is_loaded(ends, module, tmp_path, monkeypatch):
    monkeypatch.setattr("fused_merge.sweep.evaluate.load_model", pytest.fail)
    module("ones", "def one(model):\n    return 1\n")
    out, scorers = tmp_path / "out", ["ones:one"]
    base, tuned = ends

    def refused(error, message, *, base=base, tuned=tuned, **options):
        with pytest.raises(error, match=message):
            sweep_checkpoints(base, tuned, [0, 1], out, **{"scorers": scorers} | options)
        assert not out.exists()

    refused(FileNotFoundError, "nowhere does not exist; give a local", tuned="nowhere")
    refused(FileNotFoundError, "nowhere does not exist; give a local", base="nowhere")
    refused(
        FileNotFoundError,
        "model.safetensors has no config.json, so nothing says what model it is; give a model folder",
        tuned=tuned / "model.safetensors",
    )
    refused(ValueError, "device must be 'cpu' or 'cuda', got 'fast'", device="fast")
    refused(ValueError, "device 'meta' cannot compute here; use 'cpu'", device="meta")
    refused(ValueError, "dtype must be 'bfloat16', .* got 'int8'", dtype="int8")
    refused(ValueError, "two scorers are called 'one'; rename one", scorers=scorers * 2)
    refused(ValueError, "there is no scorer", scorers=[])
    refused(
        ImportError,
        r"tasks need the lm-evaluation-harness \(.*\): pip install 'fused_merge\[evaluation\]'",
        tasks=["t"],
    )
    refused(FileNotFoundError, "gone.json", compare=["gone.json"])
    for missing, sentence in (
        ("matplotlib", r"pareto.png needs matplotlib: pip install 'fused_merge\[plots\]'"),
        ("transformers", r"models are loaded by Transformers: pip install 'fused_merge\[evaluation\]'"),
    ):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, missing, None)
            refused(ImportError, sentence)


def test_models_and_tokenizers_that_transformers_cannot_load(ends, module, tmp_path):
    module("words", "def scorer(model, tokenizer):\n    return 1\n")
    for file in ends[1].glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match=r"AutoTokenizer of Transformers cannot load .*tuned \(ValueError: Could"):
        sweep_checkpoints(*ends, [0], tmp_path / "out", scorers=["words:scorer"])
    (ends[1] / "config.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"AutoModelForCausalLM of Transformers cannot load .*tuned \(ValueError: Unrec"
    ):
        sweep_checkpoints(*ends, [0], tmp_path / "out", scorers=["words:scorer"])


# --- the lm-evaluation-harness, as a stand-in


@pytest.fixture
def harness(monkeypatch):
    """A module with the names and the answers of lm_eval 0.4; remembers what it was asked."""
    asked = SimpleNamespace(wrapped=None, calls=[])

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            assert asked.wrapped is None
            self.model = pretrained
            asked.wrapped = (pretrained, tokenizer, batch_size)

    def simple_evaluate(model, tasks, task_manager, **options):
        assert task_manager == "every task"
        asked.calls.append((tasks, options))
        (task,) = tasks
        if task == "unknown":
            raise KeyError("unknown")
        size = float(model.model.lm_head.weight.double().sum())
        return {
            "results": {
                task: {
                    "alias": task,
                    "sample_len": 3,
                    "acc,none": size,
                    "acc_stderr,none": "N/A",
                    "perplexity,none": 2.0,
                    "exact_match,strict-match": 0.5,
                    "exact_match_stderr,strict-match": 0.1,
                }
            },
            "higher_is_better": {task: {"acc": True, "perplexity": False, "exact_match": None}},
        }

    root, models, huggingface, manager = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks")
    )
    root.simple_evaluate, huggingface.HFLM, manager.TaskManager = simple_evaluate, HFLM, lambda: "every task"
    for stand_in in (root, models, huggingface, manager):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return asked


def test_tasks_of_the_harness(ends, harness, tmp_path):
    files = sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=["first", "second"], batch_size=4)
    rows = read_results(files[0]).finished
    sums = [
        float(load_file(folder / "model.safetensors")["model.embed_tokens.weight"].double().sum()) for folder in ends
    ]
    for row, expected in zip(rows, sums, strict=True):
        assert row.scores == {
            f"{task}/{metric}": value
            for task in ("first", "second")
            for metric, value in (("acc", expected), ("perplexity", 2.0), ("exact_match,strict-match", 0.5))
        }
    model, tokenizer, batch_size = harness.wrapped
    assert (type(model).__name__, tokenizer.vocab_size, batch_size) == ("LlamaForCausalLM", 3, 4)
    assert [tasks for tasks, _ in harness.calls] == [["first"], ["second"]] * 2
    assert harness.calls[0][1] == {"bootstrap_iters": 0, "log_samples": False}
    # The harness knows of which less is better, and so does whoever goes on.
    assert results_of(tmp_path / "out")["lower_is_better"] == ["first/perplexity", "second/perplexity"]
    assert read_results(files[0]).maximize == [True, False, True] * 2
    sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=["first", "second"])
    assert len(harness.calls) == 4
    assert read_results(files[0]).maximize == [True, False, True] * 2


def test_a_task_that_the_harness_does_not_know(ends, harness, tmp_path):
    with pytest.raises(RuntimeError, match="scorer 'unknown' at ratio 0 raised KeyError: 'unknown'; correct it"):
        sweep_checkpoints(*ends, [0, 1], tmp_path / "out", tasks=["unknown"])


def test_a_task_without_directions_is_to_be_maximized():
    task = HarnessTask("t", lambda **options: {"results": {"t": {"alias": "t", "acc,none": 0.5}}}, None, None)
    assert task(None) == {"acc": 0.5}
    assert task.lower_is_better == set()
