from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_merge.eager.sparsify import kept_count, magnitude_mask, sparsify, tau_mask

NAN, INF = float("nan"), float("inf")


def mask(values, rate):
    return magnitude_mask(torch.tensor(values), rate).tolist()


def test_top_of_five_by_hand():
    # k = floor(0.4 * 5) = 2: the magnitudes 4 and 3.
    assert mask([1.0, -4.0, 0.5, 3.0, -2.0], 0.4) == [False, True, False, True, False]


def test_ties_at_the_threshold_all_stay():
    # k = 1, and three elements share the largest magnitude.
    assert mask([2.0, -2.0, 1.0, 2.0], 0.25) == [True, True, False, True]
    # k = 3 reaches the ones.
    assert mask([2.0, -2.0, 1.0, -1.0], 0.75) == [True, True, True, True]


def test_a_small_tensor_keeps_at_least_one():
    assert kept_count(5, 0.01) == 1
    assert mask([1.0, -4.0, 3.0], 0.01) == [False, True, False]
    assert mask([0.25], 0.01) == [True]


def test_nan_is_larger_than_infinity():
    assert mask([1.0, NAN, INF, -5.0], 0.25) == [False, True, False, False]
    assert mask([1.0, NAN, -INF, -5.0], 0.5) == [False, True, True, False]


def test_all_equal_and_all_zero_stay_whole():
    assert all(mask([3.0, -3.0, 3.0], 0.34))
    assert all(mask([0.0, -0.0, 0.0], 0.34))


def test_one_and_nothing():
    assert all(mask([1.0, 2.0, NAN], 1.0))
    assert magnitude_mask(torch.empty(0), 0.5).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitudes_equal_a_sort(dtype):
    x = torch.randn(37, 53, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for rate in (0.001, 0.1, 0.77, 0.999):
        assert np.array_equal(magnitude_mask(x, rate).numpy(), reference.top(x.numpy(), rate))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.floats(0.001, 1.0))
def test_what_is_kept_is_never_smaller_than_what_is_dropped(values, rate):
    x = torch.tensor(values, dtype=torch.float32)
    keep = magnitude_mask(x, rate)
    assert keep.sum() >= kept_count(len(values), rate)
    if not keep.all():
        assert x[keep].abs().min() > x[~keep].abs().max()


def test_sparsify_puts_zeros():
    kept = sparsify(torch.tensor([1.0, NAN, 3.0]), torch.tensor([True, False, True]))
    assert kept.tolist() == [1.0, 0.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tau_is_drawn_in_its_own_domain_at_step_zero(dtype):
    tau = torch.randn(30, 40).to(dtype)
    expected = reference.keep(1200, 0.2, 9, 0, "a.weight", 1).reshape(30, 40)
    for name in ("a.weight", "module.a.weight"):
        drawn = tau_mask(tau, name=name, method="random", reserve_rate=0.2, seed=9)
        assert np.array_equal(drawn.numpy(), expected)


def test_tau_by_magnitude_and_whole():
    tau = torch.tensor([1.0, -4.0, 0.5, 3.0]).bfloat16()
    by_magnitude = tau_mask(tau, name="a", method="magnitude", reserve_rate=0.5, seed=0)
    assert by_magnitude.tolist() == [False, True, False, True]
    assert tau_mask(tau, name="a", method="none", reserve_rate=0.5, seed=0).all()


def test_an_unknown_way_is_named():
    with pytest.raises(ValueError, match="unknown way to sparsify a reference delta: 'top'"):
        tau_mask(torch.ones(3), name="a", method="top", reserve_rate=0.5, seed=0)
