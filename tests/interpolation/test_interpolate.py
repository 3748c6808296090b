"""Points of the path between two tensors or state dicts: bits at the ends, rounding between."""

from __future__ import annotations

import pytest
import torch
from bits import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import llama

from fused_merge.interpolation.interpolate import interpolate

RATIOS = [-0.3, 0.0, 0.1, 0.4999, 0.5, 0.9, 1.0, 1.4]
PATTERN = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def pair(n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(n, generator=generator)
    return base.to(dtype), (base + 1e-3 * torch.randn(n, generator=generator)).to(dtype)


def ordered(tensor):
    """Bit patterns as integers in the order of the values: neighbors are one ulp apart."""
    pattern = tensor.view(PATTERN[tensor.dtype]).long()
    return torch.where(pattern >= 0, pattern, torch.iinfo(PATTERN[tensor.dtype]).min - pattern)


def on_the_path(base, tuned, ratio):
    return (base.double() + ratio * (tuned.double() - base.double())).to(base.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_against_float64_rounded_once(dtype, monkeypatch):
    # More than one chunk, and an odd rest.
    monkeypatch.setattr("fused_merge.interpolation.interpolate._CHUNK", 2**14)
    base, tuned = pair(2**16 + 10_003, dtype)
    points = interpolate(base, tuned, RATIOS)
    assert points.shape == (len(RATIOS), base.numel())
    for ratio, point in zip(RATIOS, points, strict=True):
        exact = on_the_path(base, tuned, ratio)
        distance = (ordered(point) - ordered(exact)).abs()
        assert distance.count_nonzero() <= 1e-4 * base.numel()
        # Where the path crosses zero, an ulp of the result is less than fp32 can tell apart at the ends.
        error = (point.double() - exact.double()).abs()
        assert ((distance <= 1) | (error <= 2**-23 * torch.maximum(base.abs(), tuned.abs()).double())).all()


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (127,), (5, 7, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shapes(shape, dtype):
    base, tuned = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    points = interpolate(base, tuned, [0.0, 0.25, 1.0])
    assert points.shape == (3, *shape)
    assert points.dtype == dtype
    assert same_bits(points[0], base)
    assert same_bits(points[2], tuned)
    torch.testing.assert_close(points[1], on_the_path(base, tuned, 0.25))


@settings(max_examples=50, deadline=None)
@given(
    patterns=st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1)), min_size=1, max_size=50),
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
)
def test_the_ends_are_copies_of_any_bits(patterns, dtype):
    """−0.0, infinities, denormals and the payloads of NaNs included."""
    words = torch.tensor(patterns, dtype=torch.int32).to(torch.int16).T.contiguous()
    base, tuned = words.view(dtype)
    points = interpolate(base, tuned, [0.0, 1.0, -0.0])
    assert all(map(same_bits, points, (base, tuned, base)))


def test_strides_and_inputs_stay_as_they_are_and_no_gradient_flows():
    base, tuned = torch.randn(6, 4, requires_grad=True).T, torch.randn(4, 6)
    kept = base.clone(), tuned.clone()
    points = interpolate(base, tuned, [0.3, 2])
    assert not points.requires_grad
    assert all(map(torch.equal, (base, tuned), kept))
    torch.testing.assert_close(points[1], (2 * tuned - base).detach())


def test_state_dicts():
    base, tuned = llama(0).state_dict(), llama(1).state_dict()
    points = interpolate(base, tuned, [0.0, 0.3])
    assert [list(point) for point in points] == [list(base)] * 2
    for name, tensor in base.items():
        assert same_bits(points[0][name], tensor)
        assert same_bits(points[1][name], interpolate(tensor, tuned[name], [0.3])[0])
    assert points[1]["lm_head.weight"] is points[1]["model.embed_tokens.weight"]


def test_integers_are_copied_from_tuned_and_names_kept():
    base = {"module.w": torch.zeros(2), "module.count": torch.tensor(3)}
    tuned = {"w": torch.ones(2), "count": torch.tensor(5)}
    at_base, between = interpolate(base, tuned, [0.0, 0.5])
    assert {name: tensor.tolist() for name, tensor in between.items()} == {"module.w": [0.5, 0.5], "module.count": 5}
    assert at_base["module.count"].item() == 3
    assert between["module.count"] is not tuned["count"]


ONE, TWO = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize(
    ("base", "tuned", "ratios", "error", "message"),
    [
        (ONE, ONE, [], ValueError, "ratios is empty"),
        (ONE, ONE, [0.1, float("nan")], ValueError, "a ratio must be finite, got nan"),
        (ONE, ONE, [float("-inf")], ValueError, "a ratio must be finite, got -inf"),
        (ONE, ONE, 0.3, TypeError, r"ratios must be a sequence, got 0.3; put it into a list"),
        (ONE, ONE, [{".*": 0.3}], TypeError, "two tensors have no names, so their ratios must be numbers"),
        (TWO, torch.ones(3), [0.5], ValueError, r"base is \[2\] torch.float32 on cpu but tuned \[3\]"),
        (TWO, TWO.half(), [0.5], ValueError, "but tuned .* torch.float16 on cpu; make shape, dtype"),
        (torch.arange(2), torch.arange(2), [0.5], ValueError, "only floating tensors can be interpolated"),
        (TWO, {}, [0.5], TypeError, "two tensors or two state dicts, got a Tensor and a dict; use interpolate_c"),
        ("base/", "tuned/", [0.5], TypeError, "got a str and a str"),
        ({"a": ONE}, {"b": ONE}, [0.5], ValueError, r"no tensor is in both of base \(state dict\)"),
        ({"a": ONE}, {"a": TWO}, [0.5], ValueError, r"'a' is \[1\] and \[2\]"),
        ({"a": ONE}, {"a": ONE.half()}, [0.5], ValueError, "'a' is torch.float32 and torch.float16"),
    ],
)
def test_what_does_not_fit(base, tuned, ratios, error, message):
    with pytest.raises(error, match=message):
        interpolate(base, tuned, ratios)


def test_an_unknown_impl():
    with pytest.raises(ValueError, match="impl"):
        interpolate(ONE, ONE, [0.5], impl="fast")
