"""The picture of what merging did: rows, steps and values, from statistics and from a trainer's log."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

import fused_merge as fm

NAN = float("nan")
TITLES = [
    "cosine of u and tau",
    "share of u that is kept",
    "share of kept u that is lost",
    "share of opposite signs",
    "share of tau that is kept",
    "share of kept tau that is lost",
]
KEYS = ("cosine", "kept_u", "lost_u", "conflicts", "kept_tau", "lost")


def stats(*values):
    """What `merge_stats` says of one tensor."""
    return dict(zip(KEYS, values, strict=True)) | {"norm_u": 1.0}


def history_of(layers, steps=(1, 2)):
    """Statistics that rise with the layer and the step."""
    return {
        step: {
            f"model.layers.{i}.{name}.weight": stats(*(step + i + k / 8 + shift for k in range(6)))
            for i in range(layers)
            for name, shift in (("up", -0.5), ("down", 0.5))
        }
        | {"model.norm.weight": stats(*[0.0] * 6)}
        for step in steps
    }


def panels(figure):
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_few_layers_are_lines():
    # Steps in any order; a list of layers by number, and first what is in none.
    figure = fm.plot_merge_stats(history_of(2, steps=(20, 10)))
    assert [axes.get_title(loc="left") for axes in figure.axes] == TITLES
    for k, axes in enumerate(figure.axes):
        lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        assert list(lines) == ["model.norm.weight", "model.layers.0", "model.layers.1"]
        assert lines["model.norm.weight"] == [[10, 0], [20, 0]]
        assert lines["model.layers.1"] == [[10, 11 + k / 8], [20, 21 + k / 8]]
        looks = {(line.get_marker(), line.get_linestyle()) for line in axes.lines}
        assert len(looks) == 3
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(lines)


@pytest.mark.parametrize(("layers", "geometry"), [(32, (2, 3)), (80, (1, 6))])
def test_many_layers_are_heat_maps(layers, geometry):
    figure = fm.plot_merge_stats(history_of(layers, steps=(10, 25)))
    drawn = panels(figure)
    assert [axes.get_title(loc="left") for axes in drawn] == TITLES
    names = [text.get_text() for text in drawn[0].get_yticklabels()]
    assert names == ["model.norm.weight", *(f"model.layers.{i}" for i in range(layers))]
    assert drawn[0].get_subplotspec().get_geometry()[:2] == geometry
    for k, axes in enumerate(drawn):
        assert axes.get_xlabel() == "step"
        assert [text.get_text() for text in axes.get_xticklabels()] == ["10", "25"]
        expected = [[0, 0], *([10 + i + k / 8, 25 + i + k / 8] for i in range(layers))]
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)


def test_a_layer_that_joins_later():
    history = {0: {}, 1: {"h.0.w": stats(*[1.0] * 6)}, 2: {"h.0.w": stats(*[2.0] * 6), "h.1.w": stats(*[3.0] * 6)}}
    first = fm.plot_merge_stats(history).axes[0]
    assert {line.get_label(): line.get_xdata().tolist() for line in first.lines} == {"h.0": [0, 1, 2], "h.1": [0, 1, 2]}
    np.testing.assert_array_equal([line.get_ydata() for line in first.lines], [[NAN, 1, 2], [NAN, NAN, 3]])


def test_the_log_of_a_trainer_tells_the_same():
    history = history_of(2)
    log = [{"step": 1, "loss": 3.0, "merge/cosine": 9.0}, {"step": 2, "merge/cosine": 9.0}, {"step": 2, "eval_loss": 1}]
    for entry in log[:2]:
        for i in range(2):
            halves = [history[entry["step"]][f"model.layers.{i}.{name}.weight"] for name in ("up", "down")]
            entry |= {f"merge/model.layers.{i}/{key}": (halves[0][key] + halves[1][key]) / 2 for key in halves[0]}
        norm = history[entry["step"]]["model.norm.weight"]
        entry |= {f"merge/model.norm.weight/{key}": value for key, value in norm.items()}
    one, other = fm.plot_merge_stats(history), fm.plot_merge_stats(log)
    for mine, theirs in zip(one.axes, other.axes, strict=True):
        drawn = [{line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in (mine, theirs)]
        assert drawn[0] == drawn[1]
        assert len(drawn[0]) == 3


def test_what_a_run_collects():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(2)])})
    base = {name: param.detach() - 0.1 for name, param in model.named_parameters()}
    delta = fm.ReferenceDelta.from_models(base, model)
    optimizer = fm.OnTIESAdamW(model.named_parameters(), reference_delta=delta, reserve_rate=0.5, stats_every=1)
    history = {}
    for step in range(3):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        optimizer.step()
        history[step] = optimizer.merge_stats()
    axes = fm.plot_merge_stats(history).axes
    for row, line in enumerate(axes[4].lines):
        own = [[entry["kept_tau"] for name, entry in history[s].items() if f".{row}." in name] for s in range(3)]
        assert line.get_ydata().tolist() == [sum(each) / 2 for each in own]
        assert min(map(min, own)) > 0


@pytest.mark.parametrize("layers", [2, 32])
@pytest.mark.parametrize("name", ["merging.png", "merging.svg"])
def test_the_same_history_is_the_same_file(name, layers, tmp_path):
    for folder in ("a", "b"):
        fm.plot_merge_stats(history_of(layers), tmp_path / folder / name)
    written = (tmp_path / "a" / name).read_bytes()
    assert written == (tmp_path / "b" / name).read_bytes()
    assert written.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")


SHARED = history_of(1)[1]


@pytest.mark.parametrize(
    ("history", "error", "sentence"),
    [
        ({}, ValueError, r"holds no statistics by layer; collect them with stats_every=n and history\[step\] = op"),
        ({1: {}, 2: {}}, ValueError, "the history holds no statistics by layer"),
        ([], ValueError, r"no statistics by layer; .* MergeStatsCallback\(trainer, per_layer=True\)"),
        ([{"step": 1, "loss": 1.0, "merge/cosine": 0.1}], ValueError, "no statistics by layer; .* per_layer=True"),
        (SHARED, TypeError, "a step of the history must be a number, got 'model.layers.0.up.weight'; collect it as"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_drawn(history, error, sentence, tmp_path):
    with pytest.raises(error, match=sentence):
        fm.plot_merge_stats(history, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a\.jpg must end in \.png or \.svg"):
        fm.plot_merge_stats(history_of(1), tmp_path / "a.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^plot_merge_stats needs matplotlib: pip install 'fused_merge\[plots\]'$"):
        fm.plot_merge_stats(history_of(1))
