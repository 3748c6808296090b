"""The report of a sweep: its table by hand, several sweeps in one, and the picture."""

from __future__ import annotations

import json
import sys

import pytest

from fused_merge.sweep.plots import draw_fronts
from fused_merge.sweep.report import write_report
from fused_merge.sweep.results import Results, ScoredRatio, read_results


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


def test_the_table_by_hand(tmp_path):
    points = {"0": (0.0, 1.0), "0.5": (6.0, 2.0), "0.7": (5.0, 2.5), "0.8": (8.0, 6.0), "1": (10.123456789, 11.0)}
    scores = {label: {"reward": reward, "tax|x": tax} for label, (reward, tax) in points.items()}
    write_results(tmp_path / "path", scores, minimize=["tax|x"])
    files = write_report(tmp_path / "path")
    assert [file.name for file in files] == ["results.json", "results.md", "pareto.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
    # 6 x 9 + 2 x 5, and nothing of what is as bad as the worst.
    assert files[1].read_text(encoding="utf-8") == (
        "# Ratios of path\n\n"
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
    message = (
        f"{other} has the scores 'reward', 'loss' and {main} has 'reward', 'tax'; compare sweeps with the same scores"
    )
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "main", [other])
    empty = tmp_path / "empty.json"
    empty.write_text('{"sweep": {}, "minimize": [], "lower_is_better": [], "rows": []}')
    with pytest.raises(ValueError, match=r"empty\.json has no finished ratio yet; run that sweep first"):
        write_report(tmp_path / "main", [empty])


def test_one_score_makes_no_picture(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_results(tmp_path / "path", {"0": {"loss": 2.0}, "1": {"loss": 1.0}}, lower=["loss"])
    files = write_report(tmp_path / "path")
    assert [file.name for file in files] == ["results.json", "results.md"]
    assert "Hypervolume 1, knee at 1." in files[1].read_text(encoding="utf-8")


def test_volumes_of_many_scores_are_left_out(tmp_path):
    path = write_results(tmp_path / "path", {label: {name: float(label) for name in "abcde"} for label in "01"})
    assert read_results(path).document()["hypervolume"] is None
    assert "Hypervolume not computed (more than 4 scores), knee at 1." in write_report(path.parent)[1].read_text()


def test_a_picture_without_matplotlib(tmp_path, monkeypatch):
    write_results(tmp_path / "path", {"0": {"a": 2.0, "b": 1.0}})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pareto.png needs matplotlib: pip install 'fused_merge\[plots\]'"):
        write_report(tmp_path / "path")
    assert (tmp_path / "path" / "results.md").exists()


# --- the picture

SWEEPS = {
    "one": {"0": (1.0, 9.0), "0.5": (3.0, 5.0), "1": (2.0, 7.0)},
    "cost in $\\no$": {"$a": (4.0, 8.0), "b": (3.0, 4.0), "c": (2.0, 8.0)},
}


def results(sweep, scores=("reward", "tax"), minimize=("tax",)):
    scored = [ScoredRatio(label, 0.0, dict(zip(scores, point, strict=True))) for label, point in sweep.items()]
    return Results({}, scored, minimize)


def test_a_picture_shows_every_point_its_label_and_each_front():
    figure = draw_fronts({name: results(sweep) for name, sweep in SWEEPS.items()})
    (axes,) = figure.axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert drawn["one"] == [[3.0, 5.0]]
    assert drawn["cost in $\\no$"] == [[3.0, 4.0], [4.0, 8.0]]
    # The fronts are told apart without color.
    fronts = [line for line in axes.lines if line.get_label() in SWEEPS]
    assert len({line.get_marker() for line in fronts}) == len({line.get_linestyle() for line in fronts}) == 2
    points = sorted(tuple(point) for line in axes.lines for point in line.get_xydata())
    assert points == sorted(point for sweep in SWEEPS.values() for point in sweep.values())
    labels = {text.get_text(): text.xy for text in axes.texts}
    assert labels == {label: point for sweep in SWEEPS.values() for label, point in sweep.items()}
    assert (axes.xaxis.get_inverted(), axes.yaxis.get_inverted()) == (False, True)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("reward", "tax (axis reversed)")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == list(SWEEPS)


def test_the_same_picture_is_the_same_file(tmp_path):
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_results(folder, {"0": {"a": 2.0, "$b": 1.0}, "1": {"a": 3.0, "$b": 2.0}}, ["a"])
        write_report(folder)
    assert (tmp_path / "a/pareto.png").read_bytes() == (tmp_path / "b/pareto.png").read_bytes()
