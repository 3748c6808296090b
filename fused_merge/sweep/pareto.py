"""Pareto fronts: the points that no other point beats, how much they dominate, and where their front bends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = "NDArray[np.float64]"

# One for all scores, or one for each.
Directions: TypeAlias = "bool | Sequence[bool]"


def pareto_front(points: Sequence[Sequence[float]], *, maximize: Directions = True) -> list[int]:
    """Return the points that no other point dominates.

    A point dominates another if it is at least as good in every score and better in one. Equal points do not
    dominate one another: if one is on the front, all of them are.

    Args:
        points: n points of d scores each, such as `[(reward, tax score), ...]`, or an array `[n, d]`.
        maximize: whether more is better, for all scores or for each of the d.

    Returns:
        Indices of `points`, ascending; none of no points.

    Raises:
        ValueError: if a score is not finite, the points differ in length, or `maximize` does not fit them.

    Example:
        >>> import fused_merge as fm
        >>> points = [(0.1, 0.9), (0.5, 0.6), (0.4, 0.5), (0.9, 0.1)]
        >>> fm.pareto_front(points)  # the third is worse than the second in both scores
        [0, 1, 3]
    """
    scores = _oriented(points, maximize)
    return [i for i, point in enumerate(scores) if not _is_dominated(point, scores)]


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float], *, maximize: Directions = True) -> float:
    """Return the volume of all that the points dominate and that dominates the reference.

    Exact but for the rounding of fp64, in the units of the scores multiplied. The volume is cut into slices along the
    last score, each of which is the volume of one score less (Knowles 2002; While et al. 2006, IEEE Transactions on
    Evolutionary Computation 10(1), "hypervolume by slicing objectives"); the time grows as n^(d - 1).

    Args:
        points: as for `pareto_front`; a point that is not better than `reference` in every score adds nothing.
        reference: d scores that count as worthless.
        maximize: as for `pareto_front`.

    Returns:
        The volume; 0.0 of no points.

    Raises:
        ValueError: as for `pareto_front`, or if `reference` and the points differ in length.

    Example:
        >>> import fused_merge as fm
        >>> points = [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]
        >>> fm.hypervolume(points, reference=(0.0, 0.0))
        6.0
        >>> fm.hypervolume([*points, (3.0, 2.0)], reference=(0.0, 0.0))
        7.0
    """
    worthless = _oriented([reference], maximize, what="the reference")[0]
    scores = _oriented(points, maximize)
    if not len(scores):
        return 0.0
    if scores.shape[1] != len(worthless):
        raise ValueError(f"the reference has {len(worthless)} scores and a point {scores.shape[1]}; give one for each")
    above = scores - worthless
    return _volume(above[(above > 0).all(axis=1)])


def knee(points: Sequence[Sequence[float]], *, maximize: Directions = True) -> int:
    """Return the point of the front at which gaining more of one score begins to cost most of the others.

    Each score is scaled to [0, 1] over the front (to 0 where all are equal). The knee is the point that lies farthest
    beyond the plane through the corners where one score is 1 and all others are 0, towards the ideal: for two scores,
    farthest from the straight line between the ends of the front (Das 1999, Structural Optimization 18, 107-115, with
    the corners in place of the best points). That is the largest sum of scaled scores. A tie goes to the better first
    score, then to the first point; a front that only bends inwards has its knee at an end.

    Args:
        points: as for `pareto_front`, at least one.
        maximize: as for `pareto_front`.

    Returns:
        The index of the knee in `points`.

    Raises:
        ValueError: as for `pareto_front`, or if there is no point.

    Example:
        >>> import fused_merge as fm
        >>> points = [(0.0, 1.0), (0.8, 0.8), (1.0, 0.0)]
        >>> points[fm.knee(points)]
        (0.8, 0.8)
    """
    scores = _oriented(points, maximize)
    front = pareto_front(points, maximize=maximize)
    if not front:
        raise ValueError("there is no point that could be a knee; give at least one")
    best, worst = scores[front].max(axis=0), scores[front].min(axis=0)
    width = np.where(best > worst, best - worst, 1.0)
    scaled = (scores[front] - worst) / width
    _, _, first = max(zip(scaled.sum(axis=1), scaled[:, 0], (-i for i in front), strict=True))
    return -first


def _oriented(points: Any, maximize: Directions, what: str | None = None) -> Array:
    """Return the points as an array `[n, d]` in which more is better, or say which point is no point."""
    found: list[Array] = []
    for i, point in enumerate(points):
        name = what or f"point {i}"
        try:
            scores = np.asarray(point, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name} is {point!r}, which are not all numbers; give one for each score") from error
        found.append(scores)
        if scores.ndim != 1 or not scores.size:
            raise ValueError(f"{name} must be a sequence of scores, such as (reward, tax score), got {point!r}")
        if scores.size != found[0].size:
            size = found[0].size
            raise ValueError(f"{name} has {scores.size} scores and point 0 has {size}; give all the same scores")
        if not np.isfinite(scores).all():
            j = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise ValueError(f"score {j} of {name} is {scores[j]}; leave that point out, or score it again")
    if not found:
        return np.empty((0, 0))
    more = [maximize] * found[0].size if isinstance(maximize, bool) else list(maximize)
    if len(more) != found[0].size:
        raise ValueError(f"maximize has {len(more)} entries for {found[0].size} scores; give True or False for each")
    signs: Array = np.where(more, 1.0, -1.0)
    return np.stack(found) * signs


def _is_dominated(point: Array, by: Array) -> bool:
    return bool(((by >= point).all(axis=1) & (by > point).any(axis=1)).any())


def _volume(points: Array) -> float:
    """Return the volume between zero and points `[n, d]` that are above it in every score."""
    if not len(points):
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    if points.shape[1] == 2:
        widths, heights = points[np.argsort(-points[:, 0])].T
        return float(np.dot(widths - np.append(widths[1:], 0.0), np.maximum.accumulate(heights)))
    points = points[[not _is_dominated(point, points) for point in points]]
    points = points[np.argsort(-points[:, -1])]
    depths = points[:, -1] - np.append(points[1:, -1], 0.0)
    # Slice i reaches down to the next point's last score, and holds the points before that.
    return sum(float(depth) * _volume(points[: i + 1, :-1]) for i, depth in enumerate(depths) if depth > 0)
