"""The common style: what tells lines apart without color, and files that are the same each time."""

from __future__ import annotations

import sys
from itertools import pairwise

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from fused_merge.plots.style import look, picture_path, style, write_picture


def a_picture():
    with style():
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot([0, 1], [1, 0], label="$x", **look(0))
        figure.legend()
    return figure


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.SVG", b"<?xml")])
def test_the_same_picture_is_the_same_file(name, start, tmp_path):
    first, second = tmp_path / "first" / name, tmp_path / "second" / name
    for path in (first, second):
        write_picture(a_picture(), picture_path(path))
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(start)
    # Neither a date nor a version, which another day or another matplotlib would change.
    for text in (b"<dc:date>", b"atplotlib v", b"Software"):
        assert text not in first.read_bytes()


def test_lines_differ_by_more_than_their_color():
    looks = [look(i) for i in range(6)]
    for key in ("color", "marker"):
        assert len({each[key] for each in looks}) == 6
    assert all(one["linestyle"] != other["linestyle"] for one, other in pairwise(looks))
    assert look(24) == look(0)


def test_labels_in_the_colors_of_lines_can_be_read_on_white():
    for i in range(6):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(look(i)["color"])]
        luminance = sum(x * weight for x, weight in zip(linear, (0.2126, 0.7152, 0.0722), strict=True))
        # Of the WCAG, for large text and graphics.
        assert 1.05 / (luminance + 0.05) >= 3


def test_what_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"a\.pdf must end in \.png or \.svg, since that says what is written; rename"):
        picture_path(tmp_path / "a.pdf")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^a\.svg needs matplotlib: pip install 'fused_merge\[plots\]'$"):
        picture_path(tmp_path / "a.svg")
