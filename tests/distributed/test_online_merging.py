"""Two processes that share a model merge around an optimizer as one does."""

from __future__ import annotations

from itertools import product

import merged_around
import pytest
import torch
from bits import assert_same_bits
from processes import Pair

METHODS = ("ondare", "onties", "onproj", "onsoft")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp("pair"))
    yield pair
    pair.stop()


def assert_equal(method, ours, theirs):
    if method != "onproj":
        assert_same_bits(ours, theirs)
        return
    # Sums over two halves are rounded otherwise.
    for x, y in zip(ours.values(), theirs.values(), strict=True):
        torch.testing.assert_close(x, y, rtol=3e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "every", "impl"),
    # The kernels in the interpreter take their time.
    [*product(METHODS, (1, 2), ["eager", "compiled"]), ("onties", 2, "triton"), ("onproj", 2, "triton")],
)
def test_under_fsdp2(method, every, impl, pair):
    options = {"method": method, "merge_every": every, "stats_every": 3, "impl": impl}
    expected, state = merged_around.alone(options, 3)
    for weights, own in pair.both(merged_around.under_fsdp, options, 3):
        assert_equal(method, weights, expected)
        assert own.keys() == state.keys()
        for name, kept in own.items():
            assert_equal(
                method, {"x": kept.get("anchor", weights[name])}, {"x": state[name].get("anchor", expected[name])}
            )
            assert kept["step"] == 3


@pytest.mark.parametrize(("method", "every"), list(product(METHODS, (1, 2))))
def test_in_flat_tensors(method, every, pair):
    options = {"method": method, "merge_every": every}
    expected, state = merged_around.alone(options, 3)
    halves, states = zip(*pair.both(merged_around.in_a_flat_tensor, options, 3), strict=True)
    assert_equal(method, {"x": torch.cat(halves)}, {"x": torch.cat([p.reshape(-1) for p in expected.values()])})
    if every == 2:
        anchors = torch.cat([own["anchor"] for each in states for own in each.values()])
        assert_equal(method, {"x": anchors}, {"x": torch.cat([own["anchor"].reshape(-1) for own in state.values()])})


def test_all_processes_raise_before_anything_has_moved(pair):
    one, other = pair.both(merged_around.badly)
    assert one == other
    assert "the processes have different reference deltas" in one
