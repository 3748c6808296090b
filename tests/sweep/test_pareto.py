"""Fronts by their definition, volumes counted cell by cell, knees by hand, and what must not change them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_merge.sweep.pareto import hypervolume, knee, pareto_front

few = settings(derandomize=True, deadline=None, max_examples=100)


@st.composite
def clouds(draw, most=12, high=5, scores=(1, 4)):
    """Points on a small grid, where ties and equal points are common, and a direction for each score."""
    d = draw(st.integers(*scores))
    point = st.tuples(*[st.integers(0, high)] * d)
    return draw(st.lists(point, min_size=1, max_size=most)), draw(st.lists(st.booleans(), min_size=d, max_size=d))


def better(a, b, more):
    """a dominates b, as the textbook has it."""
    at_least = all(x >= y if up else x <= y for x, y, up in zip(a, b, more, strict=True))
    return at_least and any(x > y if up else x < y for x, y, up in zip(a, b, more, strict=True))


@few
@given(clouds())
def test_a_front_is_what_nothing_dominates(cloud):
    points, more = cloud
    front = pareto_front(points, maximize=more)
    assert front == [i for i, p in enumerate(points) if not any(better(q, p, more) for q in points)]
    # And it dominates all that it leaves out.
    assert all(any(better(points[j], p, more) for j in front) for i, p in enumerate(points) if i not in front)


@few
@given(clouds(), st.lists(st.tuples(st.integers(1, 9), st.integers(-9, 9)), min_size=4, max_size=4))
def test_units_change_neither_front_nor_knee_and_multiply_volumes(cloud, units):
    points, more = cloud
    changed = [[x * factor + shift for x, (factor, shift) in zip(point, units, strict=False)] for point in points]
    assert pareto_front(changed, maximize=more) == pareto_front(points, maximize=more)
    assert knee(changed, maximize=more) == knee(points, maximize=more)
    reference = [0 if up else 5 for up in more]
    moved = [x * factor + shift for x, (factor, shift) in zip(reference, units, strict=False)]
    factors = np.prod([factor for factor, _ in units[: len(more)]])
    assert hypervolume(changed, moved, maximize=more) == factors * hypervolume(points, reference, maximize=more)


def test_a_front_by_hand():
    points = [(1.0, 0.9), (2.0, 0.7), (1.5, 0.6), (3.0, 0.5), (2.0, 0.7), (3.0, 0.4)]
    # Both of the equal points stay; the last one has the reward of a better one.
    assert pareto_front(points) == [0, 1, 3, 4]
    assert pareto_front(points, maximize=(True, False)) == [5]
    assert pareto_front(points, maximize=False) == [0, 2, 5]
    assert pareto_front([]) == []
    assert pareto_front([(2,), (3,), (3,)]) == [1, 2]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_points_may_be_arrays(kind):
    points = kind([[1.0, 3.0], [2.0, 2.0], [1.0, 1.0]])
    assert pareto_front(points) == [0, 1]
    assert hypervolume(points, kind([0.0, 0.0])) == 5.0
    assert knee(points) == 1


@few
@given(clouds(most=6, high=4), st.data())
def test_a_volume_is_the_number_of_cells(cloud, data):
    points, more = cloud
    reference = data.draw(st.tuples(*[st.integers(0, 4)] * len(more)))
    cells = 0
    # A cell is [x, x + 1] in every score; a point dominates it if it is at least as good as its better corner.
    for cell in itertools.product(range(4), repeat=len(more)):
        inner = [x if up else x + 1 for x, up in zip(cell, more, strict=True)]
        outer = [x + 1 if up else x for x, up in zip(cell, more, strict=True)]
        above = all(x >= r if up else x <= r for x, r, up in zip(inner, reference, more, strict=True))
        cells += above and any(
            all(p >= x if up else p <= x for p, x, up in zip(point, outer, more, strict=True)) for point in points
        )
    assert hypervolume(points, reference, maximize=more) == cells


def test_a_volume_by_hand():
    # Two boxes, 1 x 3 and 2 x 1, that share 1 x 1.
    assert hypervolume([(1, 3), (2, 1)], (0, 0)) == 4.0
    assert hypervolume([(1, 3), (2, 1)], (0, 1)) == 2.0
    assert hypervolume([(1.5, 10.0)], (1.0, 12.0), maximize=(True, False)) == 1.0
    # On the edge of the reference, or below it in one score: nothing.
    assert hypervolume([(0, 3), (2, -1)], (0, 0)) == 0.0
    assert hypervolume([], (0, 0)) == 0.0
    assert hypervolume([(2,), (3,)], (1,)) == 2.0


@few
@given(clouds())
def test_a_knee_lies_on_the_front_farthest_beyond_the_plane(cloud):
    """For two scores the plane is the straight line between the ends of the front."""
    points, more = cloud
    front = pareto_front(points, maximize=more)
    found = knee(points, maximize=more)
    assert found in front
    signed = np.array([[x if up else -x for x, up in zip(points[i], more, strict=True)] for i in front], dtype=float)
    low, high = signed.min(axis=0), signed.max(axis=0)
    distances = ((signed - low) / np.maximum(high - low, 1) - 1 / len(more)).sum(axis=1) / np.sqrt(len(more))
    assert distances[front.index(found)] == pytest.approx(distances.max(), abs=1e-12)
    assert knee([points[i] for i in front], maximize=more) == front.index(found)


def test_knees_by_hand():
    assert knee([(0, 10), (6, 9), (8, 5), (10, 0)]) == 1
    # What is not on the front does not stretch the scale.
    assert knee([(0, 10), (6, 9), (8, 5), (10, 0), (-1000, -1000)]) == 1
    assert knee([(0, 1), (6, 2), (8, 6), (10, 11)], maximize=(True, False)) == 1
    assert knee([(1, 1), (2, 2)]) == 1
    # Two ends, a straight front, and one that bends inwards: the end with the better first score.
    assert knee([(1, 2), (2, 1)]) == 1
    assert knee([(0, 4), (2, 2), (4, 0)]) == 2
    assert knee([(0, 4), (1, 1), (4, 0)]) == 2
    assert knee([(5, 5), (5, 5)]) == 0
    assert knee([(9, 0, 0), (0, 9, 0), (0, 0, 9), (5, 5, 5)]) == 3


@pytest.mark.parametrize(
    ("points", "maximize", "message"),
    [
        ([(1, 2), (float("nan"), 1)], True, "score 0 of point 1 is nan; leave that point out, or score it again"),
        ([(1, float("inf"))], True, "score 1 of point 0 is inf; leave"),
        ([(1, 2), (3, 4), (1, 2, 3)], True, "point 2 has 3 scores and point 0 has 2; give all the same scores"),
        ([1, 2], True, r"point 0 must be a sequence of scores, such as \(reward, tax score\), got 1"),
        ([(1, 2), (1, "x")], True, r"point 1 is \(1, 'x'\), which are not all numbers; give one for each score"),
        ([()], True, r"point 0 must be a sequence of scores, .* got \(\)"),
        ([(1, 2)], (True,), "maximize has 1 entries for 2 scores; give True or False for each"),
    ],
)
def test_points_that_are_none(points, maximize, message):
    for function in (pareto_front, knee, lambda p, maximize: hypervolume(p, (0, 0), maximize=maximize)):
        with pytest.raises(ValueError, match=message):
            function(points, maximize=maximize)


def test_references_that_do_not_fit_and_no_point():
    for reference, message in (
        ((0, 0, 0), "the reference has 3 scores and a point 2; give one for each"),
        ((0, float("nan")), "score 1 of the reference is nan"),
        (0, "the reference must be a sequence of scores"),
    ):
        with pytest.raises(ValueError, match=message):
            hypervolume([(1, 2)], reference)
    with pytest.raises(ValueError, match="there is no point that could be a knee; give at least one"):
        knee([])
