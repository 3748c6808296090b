"""Heat maps: cells, limits of colors, labels and numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fused_merge.plots.heat_maps import Panel, draw_heat_maps

NAN = float("nan")
VALUES = np.array([[0.1, NAN, 0.3], [-0.6, 0.2, 0.0]])


def test_a_panel_for_each_quantity():
    panels = [Panel(title, VALUES, signed) for title, signed in (("a $b", True), ("c", False), ("d", False))]
    figure, drawn = draw_heat_maps(panels, ["up", "down"], ["0", "1", "2"], cell=(0.65, 0.25), across=2)
    assert [axes.get_title(loc="left") for axes in drawn] == ["a $b", "c", "d"]
    assert [axes.get_subplotspec().get_geometry()[:3] for axes in drawn] == [(2, 2, 0), (2, 2, 1), (2, 2, 2)]
    assert [[text.get_text() for text in axes.get_yticklabels()] for axes in drawn] == [
        ["up", "down"],
        ["", ""],
        ["up", "down"],
    ]
    for axes in drawn:
        (image,) = axes.images
        assert image.get_array().filled(9).tolist() == [[0.1, 9, 0.3], [-0.6, 0.2, 0.0]]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1", "2"]
        # A cell without a number lets the hatching through.
        assert axes.patch.get_hatch()
    assert [axes.images[0].get_clim() for axes in drawn] == [(-0.6, 0.6), (-0.6, 0.3), (-0.6, 0.3)]
    # Each has a bar of its colors.
    assert len(figure.axes) == 6


def test_numbers_stand_where_there_is_room_for_them():
    def texts(values):
        columns = [str(i) for i in range(values.shape[1])]
        _, (axes,) = draw_heat_maps([Panel("a", values)], ["up", "down"], columns, cell=(0.2, 0.25), across=1)
        return {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}

    assert texts(VALUES) == {
        (0, 0): ("0.1", "black"),
        (2, 0): ("0.3", "black"),
        (0, 1): ("-0.6", "white"),
        (1, 1): ("0.2", "black"),
        (2, 1): ("0", "black"),
    }
    assert texts(np.tile(VALUES, 4)) == {}


@pytest.mark.parametrize(("columns", "labeled"), [(24, range(0, 24, 1)), (80, range(0, 80, 5)), (1000, None)])
def test_as_many_columns_are_labeled_as_there_is_room_for(columns, labeled):
    labels = [str(i) for i in range(columns)]
    _, (axes,) = draw_heat_maps(
        [Panel("a", np.zeros((1, columns)))], ["row"], labels, cell=(7 / columns, 0.25), across=1
    )
    shown = [text.get_text() for text in axes.get_xticklabels()]
    assert shown == [labels[int(tick)] for tick in axes.get_xticks()]
    if labeled is None:
        assert 5 <= len(shown) <= 30
    else:
        assert shown == [labels[i] for i in labeled]


@pytest.mark.parametrize("value", [NAN, 0.0, 0.5])
@pytest.mark.parametrize("signed", [False, True])
def test_a_quantity_without_differences_is_drawn(value, signed, tmp_path):
    figure, _ = draw_heat_maps(
        [Panel("a", np.full((2, 3), value), signed)], ["x", "y"], ["0", "1", "2"], cell=(0.65, 0.25), across=1
    )
    figure.savefig(tmp_path / "a.png")
    if value == 0.5 and not signed:
        assert figure.axes[1].get_yticks().tolist() == [0.5]
