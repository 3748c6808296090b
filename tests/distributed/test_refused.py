"""Ways to hold a tensor whose elements cannot be numbered are refused in one sentence, before anything has moved."""

from __future__ import annotations

import parallel_refused
import pytest


@pytest.mark.parametrize(
    ("way", "sentence"),
    [
        ("two dimensions", "odd: a tensor of (4, 4, 4) is sharded along dimensions [1, 2]; its elements are numbered"),
        ("partial", "odd: a tensor placed as (Partial(sum), Replicate()) is no box of the whole; redistribute it"),
    ],
)
def test_a_parameter_that_is_held_in_an_odd_way_is_refused_by_all(way, sentence, where, ranks_of):
    said = ranks_of(4, where).all(parallel_refused.step, way)
    assert len(set(said)) == 1
    assert said[0].startswith(sentence)
