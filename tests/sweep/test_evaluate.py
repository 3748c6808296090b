"""Sweeps: every ratio scored once, whatever happens in between, and what the report says of it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.sweep.evaluate import evaluate_ratios
from fused_merge.sweep.report import write_report
from fused_merge.sweep.results import ScoredRatio, read_results


def linear(value: float) -> nn.Linear:
    model = nn.Linear(3, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


@pytest.fixture
def sweep():
    """A model that is 7 everywhere, on the path from 0 to 1: its mean is the ratio. It must be 7 again at the end."""
    sweep = RatioSweep(linear(7.0), linear(0.0), linear(1.0))
    yield sweep
    assert sweep.model.weight.tolist() == [[7.0] * 3]


@pytest.fixture
def evaluate(sweep, tmp_path):
    """Score it, and write the results to a new folder."""

    def evaluate(ratios, scorers=None, **options):
        return evaluate_ratios(sweep, ratios, {"mean": mean} if scorers is None else scorers, tmp_path, **options)

    return evaluate


def mean(model):
    return model.weight.detach().mean()


def results_of(out):
    return json.loads((out / "results.json").read_text())


def labels_of(out):
    return [row["label"] for row in results_of(out)["rows"]]


def test_every_ratio_is_scored_at_its_own_weights(sweep, tmp_path):
    out = tmp_path / "new" / "out"
    # A number may come with a gradient.
    scorers = {"mean": lambda model: model.weight.mean(), "parts": lambda model: {"twice": 2 * mean(model), "one": 1}}
    rows = evaluate_ratios(sweep, [0, 0.25, 1.5], scorers, out)
    assert rows == [
        ScoredRatio("0", 0.0, {"mean": 0.0, "parts/twice": 0.0, "parts/one": 1.0}),
        ScoredRatio("0.25", 0.25, {"mean": 0.25, "parts/twice": 0.5, "parts/one": 1.0}),
        ScoredRatio("1.5", 1.5, {"mean": 1.5, "parts/twice": 3.0, "parts/one": 1.0}),
    ]
    assert read_results(out / "results.json").finished == rows
    document = results_of(out)
    ratios = {"0": 0.0, "0.25": 0.25, "1.5": 1.5}
    assert document["sweep"] == {"checkpoints": {}, "ratios": ratios, "scorers": ["mean", "parts"]}
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


def test_the_models_own_weights_are_put_aside_and_back_once(evaluate, monkeypatch):
    entered, at = [], RatioSweep.at
    monkeypatch.setattr(RatioSweep, "at", lambda self, ratio: entered.append(ratio) or at(self, ratio))
    assert [row.scores["mean"] for row in evaluate([0.25, 0.5, 1])] == [0.25, 0.5, 1]
    assert entered == [0.25]


def test_a_ratio_that_does_not_fit_the_model_keeps_the_finished_ones(evaluate, tmp_path):
    with pytest.raises(ValueError, match="ratio key 'bias' matches no tensor"):
        evaluate({"half": 0.5, "odd": {"bias": 0.1, ".*": 0.2}})
    assert labels_of(tmp_path) == ["half"]


def test_labels_of_numbers_tell_them_apart(evaluate):
    rows = evaluate([-0.0, 0.1, 0.1 + 0.2, 0.3, 1e-9, 2])
    assert [row.label for row in rows] == ["0", "0.1", "0.30000000000000004", "0.3", "1e-09", "2"]


def test_every_scorer_draws_the_same_numbers_and_the_caller_other_ones(evaluate):
    def draws(model=None):
        return {"python": random.random(), "numpy": np.random.rand(), "torch": torch.rand(())}

    def seeded():
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(5)

    seeded()
    expected = draws()
    seeded()
    first, second = evaluate([0, 1], {"a": draws, "b": draws})
    assert first.scores == second.scores
    assert [first.scores[f"a/{key}"] for key in expected] == [first.scores[f"b/{key}"] for key in expected]
    assert draws() == expected


NOISY = """
import os, random, signal
import numpy as np, torch
from fused_merge.interpolation.ratio_sweep import RatioSweep
from fused_merge.sweep.evaluate import evaluate_ratios
from fused_merge.sweep.report import write_report

def sweep(folder, out, kill_at=None):
    asked = []

    def scorer(model):
        ratio = model.weight.mean().item()
        asked.append(ratio)
        if ratio == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return {"noisy": ratio + torch.rand(()), "other": random.random() - np.random.rand()}

    ends = {role: f"{folder}/{role}.safetensors" for role in ("base", "tuned")}
    path = RatioSweep(torch.nn.Linear(3, 1, bias=False), *ends.values())
    evaluate_ratios(path, [0, 0.25, 0.5, 0.75, 1], {"s": scorer}, out, checkpoints=ends, minimize=["s/other"])
    return asked
"""


def test_a_killed_sweep_goes_on_and_ends_as_one_that_was_not(tmp_path):
    for role, value in (("base", 0.0), ("tuned", 1.0)):
        save_file({"weight": torch.full((1, 3), value)}, tmp_path / f"{role}.safetensors")
    names = {}
    exec(NOISY, names)
    assert names["sweep"](tmp_path, tmp_path / "whole") == [0.0, 0.25, 0.5, 0.75, 1.0]
    command = f"{NOISY}\nsweep({str(tmp_path)!r}, {str(tmp_path / 'killed')!r}, kill_at=0.5)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == -signal.SIGKILL
    assert labels_of(tmp_path / "killed") == ["0", "0.25"]
    assert ("front" in results_of(tmp_path / "whole"), "front" in results_of(tmp_path / "killed")) == (True, False)
    assert names["sweep"](tmp_path, tmp_path / "killed") == [0.5, 0.75, 1.0]
    assert (tmp_path / "killed/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


def test_the_same_ratios_in_another_order_are_the_same_sweep(evaluate, tmp_path):
    def until_half(model):
        if mean(model) == 0.5:
            raise KeyboardInterrupt
        return mean(model)

    with pytest.raises(KeyboardInterrupt):
        evaluate([0, 1, 0.5, 2], {"mean": until_half})
    rows = evaluate([2, 1, 0.5, 0])
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
def test_another_sweep_does_not_go_on(ratios, scorers, other, evaluate, tmp_path):
    evaluate([0, 1])
    before = (tmp_path / "results.json").read_bytes()
    message = f"json holds the results of a sweep with other {other}; choose another folder, or delete it to begin anew"
    with pytest.raises(ValueError, match=message):
        evaluate(ratios, dict.fromkeys(scorers, mean))
    assert (tmp_path / "results.json").read_bytes() == before


def test_results_of_other_checkpoints_are_not_taken_for_these(evaluate, tmp_path):
    base = tmp_path / "base.safetensors"
    save_file({"w": torch.zeros(3)}, base)
    evaluate([0, 1], checkpoints={"base": base})
    assert len(evaluate([0, 1], checkpoints={"base": base})) == 2
    # Trained again: the same path and size.
    save_file({"w": torch.ones(3)}, base)
    os.utime(base, ns=(0, 10**18))
    for checkpoints in ({"base": base}, {}):
        with pytest.raises(ValueError, match="a sweep with other checkpoints"):
            evaluate([0, 1], checkpoints=checkpoints)


def test_a_sweep_without_a_finished_ratio_is_in_nobodys_way(evaluate, tmp_path):
    def fail(model):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate([0, 1], {"fail": fail})
    assert labels_of(tmp_path) == []
    assert len(evaluate([0.5])) == 1


RESULTS = '{"sweep": {}, "minimize": [], "lower_is_better": [], "rows": [{"label": "0", "ratio": 0%s}]}'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "JSONDecodeError: .*"),
        ("[]", "TypeError: .*"),
        ('{"rows": []}', "KeyError: 'sweep'"),
        (RESULTS % "", "KeyError: 'scores'"),
        (RESULTS % ', "scores": {"a": NaN}', "ValueError: NaN is no number that JSON can hold"),
    ],
)
def test_a_file_that_holds_no_results(text, reason, evaluate, tmp_path):
    (tmp_path / "results.json").write_text(text)
    message = rf"results.json holds no results of a sweep \({reason}\); give another file, or delete it"
    with pytest.raises(ValueError, match=message):
        evaluate([0, 1])
    assert (tmp_path / "results.json").read_text() == text


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
def test_a_scorer_that_fails_half_way(answer, sentence, evaluate, tmp_path):
    good = {"a": 1, "b": 2} if isinstance(answer, dict) else 1

    def fails(model):
        if mean(model) >= 0.5 and isinstance(answer, Exception):
            raise answer
        return good if mean(model) < 0.5 else answer

    kept = rf"2 of 4 ratios, and of this one 'mean', are finished and kept in {tmp_path}/results.json"
    kept = rf"correct it and run the same again \({kept}\)"
    with pytest.raises(RuntimeError, match=f"scorer 'fails' at ratio 0.5 {sentence}; {kept}"):
        evaluate([0, 0.25, 0.5, 0.75], {"mean": mean, "fails": fails})
    assert labels_of(tmp_path) == ["0", "0.25"]
    assert results_of(tmp_path)["partial"] == [{"label": "0.5", "ratio": 0.5, "scores": {"mean": 0.5}}]
    # Corrected, it goes on from there.
    asked = []

    def corrected(model):
        asked.append(float(mean(model)))
        return dict(reversed(good.items())) if isinstance(answer, dict) else good

    again = []
    rows = evaluate(
        [0, 0.25, 0.5, 0.75], {"mean": lambda m: again.append(float(mean(m))) or mean(m), "fails": corrected}
    )
    assert (again, asked) == ([0.75], [0.5, 0.75])
    assert "partial" not in results_of(tmp_path)
    assert [row.scores["mean"] for row in rows] == [0, 0.25, 0.5, 0.75]
    # In the order of the first ratio, whatever the order of the answers.
    assert len({tuple(row.scores) for row in rows}) == 1


def test_a_direction_that_a_scorer_told_once_is_kept(evaluate, tmp_path):
    def tax(model):
        tax.lower_is_better = {"x"} if mean(model) == 0 else set()
        return {"x": mean(model)}

    evaluate([0, 1], {"tax": tax})
    assert results_of(tmp_path)["lower_is_better"] == ["tax/x"]


def test_scores_that_change_between_ratios(evaluate):
    message = r"the scores at ratio 1 are 's/1.0' and were 's/0.0' before; .* \(1 of 2 ratios are finished"
    with pytest.raises(RuntimeError, match=message):
        evaluate([0, 1], {"s": lambda model: {mean(model).item(): 1.0}})


def test_two_scorers_whose_scores_could_not_be_told_apart(evaluate):
    with pytest.raises(ValueError, match="scores of 'a/b' could be taken for those of 'a'; rename one scorer"):
        evaluate([0], {"a/b": pytest.fail, "a": pytest.fail})


def test_scores_of_a_ratio_that_is_not_finished_count_for_nothing_but_are_kept(evaluate, tmp_path):
    asked = []

    def scorer(name, stops_at=None):
        def score(model):
            if mean(model) == stops_at:
                raise KeyboardInterrupt
            asked.append((name, float(mean(model))))
            return {"x": mean(model) + torch.rand(()).item(), "loss": mean(model)}

        score.lower_is_better = {"loss"}
        return score

    names = "a", "b", "c"
    whole = evaluate_ratios(
        RatioSweep(linear(7.0), linear(0.0), linear(1.0)), [0, 1], {n: scorer(n) for n in names}, tmp_path / "whole"
    )
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate([0, 1], {"a": scorer("a"), "b": scorer("b"), "c": scorer("c", stops_at=0)})
    found = results_of(tmp_path)
    assert (found["rows"], "front" in found, found["lower_is_better"]) == ([], False, ["a/loss", "b/loss"])
    assert list(found["partial"][0]["scores"]) == ["a/x", "a/loss", "b/x", "b/loss"]
    with pytest.raises(ValueError, match="json has no finished ratio yet; run that sweep first"):
        write_report(tmp_path)
    # A wrong direction is known with the first score that it names.
    with pytest.raises(
        ValueError, match=r"minimize names 'a/y', but the scores are 'a/x', 'a/loss'; .* all scores are kept"
    ):
        evaluate([0, 1], dict.fromkeys(names, pytest.fail), minimize=["a/y"])
    # In another order the first ratio is another one, and both may be partial.
    with pytest.raises(KeyboardInterrupt):
        evaluate([1, 0], {"a": scorer("a"), "b": scorer("b", stops_at=1), "c": scorer("c")})
    assert [one["label"] for one in results_of(tmp_path)["partial"]] == ["0", "1"]
    assert evaluate([0, 1], {name: scorer(name) for name in names}) == whole
    assert asked == [("a", 0), ("b", 0), ("a", 1), ("c", 0), ("b", 1), ("c", 1)]
    assert (tmp_path / "results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


def test_details_are_kept_and_count_for_no_front(evaluate, tmp_path):
    def group(model):
        return {"acc": mean(model), "part/acc": 1 - mean(model)}

    group.details = {"part/acc"}
    evaluate([0, 1], {"group": group, "mean": mean})
    found = results_of(tmp_path)
    assert (found["details"], found["front"]) == (["group/part/acc"], ["1"])
    assert found["rows"][1]["scores"] == {"group/acc": 1.0, "group/part/acc": 0.0, "mean": 1.0}
    table = write_report(tmp_path)[1].read_text()
    assert "| ratio | group/acc ↑ | mean ↑ |  |" in table
    assert table.endswith("| in detail | 0 | 1 |\n| --- | --- | --- |\n| group/part/acc | 1 | 0 |\n")
    # Another sweep has the same scores, whatever its details.
    (tmp_path / "other").mkdir()
    for row in found["rows"]:
        del row["scores"]["group/part/acc"]
    (tmp_path / "other/results.json").write_text(json.dumps(found | {"details": []}))
    assert "## other" in write_report(tmp_path, [tmp_path / "other/results.json"])[1].read_text()


def test_results_of_an_older_version_are_finished(evaluate, tmp_path):
    row = {"label": "0", "ratio": 0.0, "scores": {"mean": 5.0}}
    sweep = {"checkpoints": {}, "ratios": {"0": 0.0, "1": 1.0}, "scorers": ["mean"]}
    old = {"fused_merge": "0.1.0", "sweep": sweep, "minimize": [], "lower_is_better": [], "rows": [row]}
    (tmp_path / "results.json").write_text(json.dumps(old))
    assert [scored.scores["mean"] for scored in evaluate([0, 1])] == [5.0, 1.0]


def test_a_tilde_is_the_home_of_the_user(sweep, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_file({"w": torch.zeros(3)}, tmp_path / "base.safetensors")
    evaluate_ratios(sweep, [0, 1], {"mean": mean}, "~/out")
    evaluate_ratios(sweep, [0, 1], {"mean": mean}, "~/more")
    report = write_report("~/out", ["~/more/results.json"])
    assert report == [tmp_path / "out/results.json", tmp_path / "out/results.md"]


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
def test_ratios_that_are_none(ratios, error, message, evaluate, tmp_path):
    with pytest.raises(error, match=message):
        evaluate(ratios)
    assert not list(tmp_path.iterdir())


def test_a_score_to_minimize_that_there_is_not(evaluate):
    asked = []

    def scorer(model):
        asked.append(1)
        return {"a": 1.0}

    def refused(message, scorers, minimize=()):
        with pytest.raises(ValueError, match=message):
            evaluate([0, 1], scorers, minimize=minimize)

    refused("minimize names 'tax', which is no score of 's'; correct it", {"s": scorer}, ["tax"])
    refused("there is no scorer; give at least one function of the model", {})
    assert not asked
    for score in ("s", "s/b"):
        refused(f"minimize names '{score}', but the scores are 's/a'; correct it", {"s": scorer}, [score])
    # Known after the first ratio, which is kept.
    assert len(asked) == 1
    evaluate([0, 1], {"s": scorer}, minimize=["s/a"])
    assert len(asked) == 2


def test_a_direction_may_be_changed_without_scoring_again(evaluate, tmp_path):
    for scorer, minimize, front in ((mean, [], ["1"]), (None, ["mean"], ["0"]), (None, [], ["1"])):
        evaluate([0, 1], {"mean": scorer}, minimize=minimize)
        assert results_of(tmp_path)["front"] == front


def test_a_folder_that_cannot_be_written_to_is_known_before_anything_is_scored(sweep, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OSError, match=r"cannot write .*out/results.json: .*; nothing of it is left"):
        evaluate_ratios(sweep, [0], {"mean": pytest.fail}, tmp_path / "out")
