"""Merges whose weights come from angles and distances: slerp, nuslerp, model stock and nearswap."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from bits import same_bits
from merge_models import random_models as models

from fused_merge.eager.merge import merge, slerp_coefficients, stock_ratio

NAN, INF = float("nan"), float("inf")
NAME = "model.layers.0.mlp.up_proj.weight"


def slerp(a, b, t):
    return merge(a, [b], [t], method="slerp", name=NAME)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0, 1.2, -0.1])
def test_slerp_turns_by_a_share_of_the_angle(dtype, t):
    a, b = torch.randn(2, 31, 17, generator=torch.Generator().manual_seed(4)).to(dtype)
    x, y = (tensor.double().numpy() for tensor in (a, b))
    # Gram and Schmidt: turn a towards the part of b that is orthogonal to it, in units of the two lengths.
    u = x / np.linalg.norm(x)
    v = y / np.linalg.norm(y)
    across = v - (u * v).sum() * u
    angle = math.atan2(np.linalg.norm(across), (u * v).sum())
    share_b = math.sin(t * angle) / math.sin(angle)
    share_a = math.cos(t * angle) - share_b * math.cos(angle)
    want = torch.from_numpy(share_a * x + share_b * y)
    got = merge(a, [b], [t], method="slerp", name=NAME)
    assert got.dtype == dtype
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), want.to(dtype).double(), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("on_base", [True, False])
@pytest.mark.parametrize("weights", [[0.3, 0.7], [1.0, 3.0], [2.0, -1.0], [0.0, 0.2]])
def test_nuslerp_turns_by_a_share_of_the_angle(dtype, on_base, weights):
    base, (a, b) = models((31, 17), dtype, count=2)
    start = base.double().numpy() if on_base else 0.0
    x, y = a.double().numpy() - start, b.double().numpy() - start
    t, lengths = weights[1] / sum(weights), [np.linalg.norm(x), np.linalg.norm(y)]
    angle = 2 * math.asin(np.linalg.norm(x / lengths[0] - y / lengths[1]) / 2)
    want = start + (math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle)
    got = merge(base if on_base else None, [a, b], weights, method="nuslerp", name=NAME)
    assert got.dtype == dtype
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), torch.from_numpy(want), rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("t", [0.0, 0.03, 0.1, 9.0])
def test_nearswap_moves_what_is_near(dtype, t):
    base, (model,) = models((31, 17), dtype, count=1)
    model[0] = base[0]
    x, y = base.double().numpy(), model.double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        w = np.minimum(1.0, np.nan_to_num(t / np.abs(x - y), nan=1.0))
    got = merge(base, [model], [t], method="nearswap", name=NAME)
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), torch.from_numpy((1 - w) * x + w * y), rtol=rtol, atol=1e-7)
    assert same_bits(got[torch.from_numpy(w == 1)], model[torch.from_numpy(w == 1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_model_stock_goes_as_far_as_the_angles_say(dtype, count):
    base, thetas = models((31, 17), dtype, count)
    common = 0.1 * torch.randn((31, 17), generator=torch.Generator().manual_seed(1))
    thetas = [(theta + common).to(dtype) for theta in thetas]
    start, *ends = (x.double().numpy().ravel() for x in (base, *thetas))
    units = np.stack([(end - start) / np.linalg.norm(end - start) for end in ends])
    cosine = (units @ units.T)[np.triu_indices(count, 1)].mean()
    t = count * cosine / (1 + (count - 1) * cosine)
    want = torch.from_numpy(t * np.mean(ends, axis=0) + (1 - t) * start).view(31, 17)
    got = merge(base, thetas, [1.0] * count, method="model_stock", name=NAME)
    assert got.dtype == dtype
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=1e-6)


def test_two_models_of_a_stock_meet_where_the_heights_of_their_triangle_do():
    base, deltas = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([[3.0, 4.0, 0.0], [0.0, 3.0, 4.0]]).double()
    got = merge(base, list(base + deltas), [1.0, 1.0], method="model_stock", name=NAME) - base
    # From each model straight at the side that joins the base with the other.
    assert torch.dot(got - deltas[0], deltas[1]).abs() < 1e-12
    assert torch.dot(got - deltas[1], deltas[0]).abs() < 1e-12


# --- by hand


def test_model_stock_by_hand():
    # 60 degrees: t = 2 * 0.5 / 1.5. Three at right angles to each other: t = 0, the base.
    assert stock_ratio([[4.0, 3.0], [3.0, 9.0]]) == pytest.approx(2 / 3)
    assert stock_ratio([[1.0, 0.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 9.0]]) == 0.0
    # Cosines of 1, 0.5 and 0.5: their mean is 2/3, and t = 3 * 2/3 / (1 + 2 * 2/3).
    assert stock_ratio([[1.0, 2.0, 0.5], [2.0, 4.0, 1.0], [0.5, 1.0, 1.0]]) == pytest.approx(6 / 7)
    # Without an angle, and against each other.
    assert stock_ratio([[1.0, 0.0], [0.0, 0.0]]) == stock_ratio([[NAN, NAN], [NAN, 1.0]]) == 0.0
    assert stock_ratio([[1.0, -1.0], [-1.0, 1.0]]) == 0.0
    base, delta = torch.ones(2), torch.tensor([2.0, 1.0])
    assert merge(base, [base + delta] * 2, [1, 1], method="model_stock", name="a").tolist() == [3.0, 2.0]


def test_nearswap_by_hand():
    base, model = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, NAN]), torch.tensor([1.0, 1.25, 1.5, 3.0, -7.0, 1.0])
    got = merge(base, [model], [0.5], method="nearswap", name="a")
    assert got[:5].tolist() == [1.0, 1.25, 1.5, 1.5, 0.5]
    assert got[5].isnan()


def test_slerp_by_hand():
    # A right angle, halfway: both by sin(45 degrees).
    half = math.sqrt(0.5)
    assert slerp_coefficients(0.5, 2.0, 3.0, 0.0) == pytest.approx((half, half))
    # 60 degrees, a third of the way: sin 40 / sin 60 and sin 20 / sin 60.
    third = [math.sin(math.radians(angle)) / math.sin(math.radians(60)) for angle in (40, 20)]
    assert slerp_coefficients(1 / 3, 2.0, 5.0, 5.0) == pytest.approx(third)
    got = slerp(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0]), 0.5)
    assert got.tolist() == pytest.approx([2 * half, 3 * half])


STRAIGHT = [(1, 2, 1.9999), (1, 2, -1.9999), (1, 1, 1 + 1e-7), (0, 2, 0), (0, 0, 0), (INF, 1, 1), (1, NAN, NAN)]


@pytest.mark.parametrize(("norm_a", "norm_b", "dot"), [*STRAIGHT, (INF, INF, INF)])
def test_without_an_angle_slerp_is_a_straight_line(norm_a, norm_b, dot):
    assert slerp_coefficients(0.25, norm_a, norm_b, dot) == (0.75, 0.25)


def test_slerp_of_nearly_one_line_of_zeros_and_of_nan():
    a = torch.randn(100, generator=torch.Generator().manual_seed(5))
    assert torch.equal(slerp(a, 2 * a, 0.25), 0.75 * a + 0.25 * (2 * a))
    assert torch.equal(slerp(a, -a, 0.25), 0.75 * a + 0.25 * -a)
    assert torch.equal(slerp(a, torch.zeros(100), 0.25), 0.75 * a)
    assert slerp(torch.zeros(3), torch.zeros(3), 0.25).tolist() == [0.0] * 3
    assert slerp(torch.tensor([1.0, NAN, 3.0]), torch.ones(3), 0.5).isnan().tolist() == [False, True, False]
