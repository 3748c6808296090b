"""The picture of a reference delta: which tensor stands in which cell."""

from __future__ import annotations

import numpy as np
import pytest

from fused_merge.plots.inspection import draw_inspection

NAN = float("nan")
NAMES = (
    "model.embed_tokens.weight",
    "model.layers.10.mlp.up_proj.weight",
    "model.layers.2.self_attn.q_proj.bias",
    "model.layers.2.mlp.up_proj.weight",
    "lm_head.weight",
)


def entries_of(names, **quantities):
    """What `inspect_delta` returns of tensors: its n-th quantity of each."""
    values = [dict(zip(quantities, each, strict=True)) for each in zip(*quantities.values(), strict=True)]
    return [{"scope": "tensor", "name": name, "numel": 1} | each for name, each in zip(names, values, strict=True)]


def panels(figure):
    """Title -> values of the panels, which come before the bars of their colors."""
    return {
        axes.get_title(loc="left"): axes.images[0].get_array().filled(NAN)
        for axes in figure.axes
        if axes.get_label() != "<colorbar>"
    }


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def test_rows_are_kinds_and_columns_are_layers():
    entries = entries_of(NAMES, norm=[1, 2, 3, 4, 5], density=[0.1, 0.2, None, 0.4, 0.5])
    layer = {"scope": "layer", "name": "model.layers.2", "numel": 2, "norm": 5, "density": 1}
    figure = draw_inspection([*entries, layer])
    first = figure.axes[0]
    assert labels(first.yaxis) == ["mlp.up_proj", "self_attn.q_proj.bias", "model.embed_tokens", "lm_head"]
    assert labels(first.xaxis) == ["–", "2", "10"]
    assert first.get_xlabel() == "layer of model.layers; –: outside the layers"
    found = panels(figure)
    assert list(found) == ["norm of tau", "share that is not zero"]
    norms = [[NAN, 4, 2], [NAN, 3, NAN], [1, NAN, NAN], [5, NAN, NAN]]
    np.testing.assert_array_equal(found["norm of tau"], norms)
    densities = [[NAN, 0.4, 0.2], [NAN] * 3, [0.1, NAN, NAN], [0.5, NAN, NAN]]
    np.testing.assert_array_equal(found["share that is not zero"], densities)


def test_a_panel_for_each_quantity_that_was_measured():
    keys = ("norm", "density", "relative_norm", "kept", "cosine", "sign_agreement")
    figure = draw_inspection(entries_of(NAMES, **{key: [i, 0, 0, 0, -i - 1] for i, key in enumerate(keys)}))
    found = panels(figure)
    assert list(found) == [
        "norm of tau / norm of base",
        "share that top-p keeps",
        "cosine with the other",
        "share of equal signs",
    ]
    assert [values[2, 0] for values in found.values()] == [2, 3, 4, 5]
    # Only a cosine has its zero in the middle.
    limits = [axes.images[0].get_clim() for axes in figure.axes if axes.get_title(loc="left")]
    assert limits == [(-3, 2), (-4, 3), (-5, 5), (-6, 5)]


def test_experts_share_a_row_and_lists_of_layers_stand_side_by_side():
    names = ["encoder.block.0.experts.0.up.weight", "encoder.block.0.experts.1.up.weight", "encoder.block.1.up.weight"]
    names += ["decoder.block.0.up.weight", "h.0"]
    figure = draw_inspection(entries_of(names, norm=[1, 3, 5, 7, 9], density=[1] * 5))
    first = figure.axes[0]
    assert labels(first.yaxis) == ["experts.*.up", "up", "h"]
    assert labels(first.xaxis) == ["0", "1", "0", "0"]
    assert first.get_xlabel() == "layer of encoder.block | decoder.block | h"
    assert [line.get_xdata()[0] for line in first.lines] == [1.5, 2.5]
    norms = [[2, NAN, NAN, NAN], [NAN, 5, 7, NAN], [NAN, NAN, NAN, 9]]
    np.testing.assert_array_equal(panels(figure)["norm of tau"], norms)


def test_layers_of_a_sequential_model():
    figure = draw_inspection(entries_of(["0.weight", "0.bias", "2.weight"], norm=[1, 2, 3], density=[1] * 3))
    first = figure.axes[0]
    assert (labels(first.yaxis), labels(first.xaxis), first.get_xlabel()) == (["weight", "bias"], ["0", "2"], "layer")


def test_many_layers_stand_in_two_rows_of_panels_without_numbers():
    def drawn(layers):
        names = [f"model.layers.{i}.up.weight" for i in range(layers)]
        keys = ("relative_norm", "density", "cosine", "sign_agreement")
        figure = draw_inspection(entries_of(names, **{key: [0.5] * layers for key in keys}))
        return figure.axes[0].get_subplotspec().get_geometry()[:2], len(figure.axes[0].texts)

    assert drawn(2) == ((1, 4), 2)
    assert drawn(32) == ((2, 2), 0)


def test_nothing_is_in_a_layer():
    with pytest.raises(ValueError, match=r"no tensor is in a layer, as 'model\.layers\.0\.mlp\.up_proj\.weight' is by"):
        draw_inspection(entries_of(["scale", "head.weight"], norm=[1, 1], density=[1, 1]))
