"""Stochastic rounding, exact sums and masters: against integers and fractions, and over a thousand steps."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_tensor import draw, optimizer_of, parameter
from torch import nn

from fused_merge.eager.philox import DOMAIN_UPDATE, MaskKey
from fused_merge.eager.rounding import join, split, stochastic, two_sum
from fused_merge.names import tensor_id

KEY = MaskKey(seed=9, step=4, tensor_id=tensor_id("a.weight"), domain=DOMAIN_UPDATE)
HALVES = [torch.bfloat16, torch.float16]


def random16(n, key=KEY):
    return (reference.words(n, key.seed, key.step, "a.weight", 2) & np.uint64(0xFFFF)).astype(np.int64)


def every_pattern(dtype):
    """All numbers of a 16-bit dtype, NaN left out, as fp32."""
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    return values[~values.isnan()]


def rounded(x, dtype, key=KEY, error=None):
    return stochastic(x, torch.zeros_like(x) if error is None else error, dtype, key)


WIDE = torch.cat([draw(5000), draw(5000, 1e-3, 1), draw(5000, 1e-7, 2), draw(5000, 1e3, 3)])


def test_bf16_equals_a_calculation_in_integers():
    x = torch.cat([WIDE, draw(500, 1e-39, 4), torch.tensor([3.4e38, -3.4e38, 0.0, -0.0])])
    bits = x.numpy().view(np.uint32).astype(np.int64)
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    expected = (sign << 15) | ((magnitude + random16(x.numel())) // 65536)
    assert np.array_equal(rounded(x, torch.bfloat16).view(torch.int16).numpy().view(np.uint16), expected)


def test_fp16_equals_a_calculation_in_fp64():
    x = torch.cat([WIDE, draw(500, 1e-8, 4)]).numpy()
    nearest = x.astype(np.float16)
    neighbor = np.nextafter(nearest, np.where(x > nearest, np.inf, -np.inf).astype(np.float16))
    distance, gap = (np.abs(y.astype(np.float64) - nearest) for y in (x, neighbor))
    expected = np.where(random16(x.size) * gap < 65536 * distance, neighbor, nearest)
    ours = rounded(torch.from_numpy(x), torch.float16).numpy()
    assert np.array_equal(ours.view(np.int16), expected.view(np.int16))
    assert 0.2 < (ours != nearest).mean() < 0.3


# Values between two neighbors, and where between: (x, error, dtype, low, high).
BETWEEN = [
    (1.0 + 2.0**-9, 0.0, torch.bfloat16, 1.0, 1.0 + 2.0**-7),
    (-1.0 - 3 * 2.0**-10, 0.0, torch.bfloat16, -1.0 - 2.0**-7, -1.0),
    (1.0 - 2.0**-10, 0.0, torch.bfloat16, 1.0 - 2.0**-8, 1.0),
    (2.0**-130 + 2.0**-135, 0.0, torch.bfloat16, 2.0**-130, 2.0**-130 + 2.0**-133),
    (2.0**-135, 0.0, torch.bfloat16, 0.0, 2.0**-133),
    (1.0 + 2.0**-12, 0.0, torch.float16, 1.0, 1.0 + 2.0**-10),
    (1.0 - 2.0**-13, 0.0, torch.float16, 1.0 - 2.0**-11, 1.0),
    (-3.0 - 2.0**-10, 0.0, torch.float16, -3.0 - 2.0**-9, -3.0),
    (2.0**-26, 0.0, torch.float16, 0.0, 2.0**-24),
    (-(2.0**-26), 0.0, torch.float16, -(2.0**-24), 0.0),
    (5.25 * 2.0**-24, 0.0, torch.float16, 5 * 2.0**-24, 6 * 2.0**-24),
    (2.0**-14 - 2.0**-26, 0.0, torch.float16, 2.0**-14 - 2.0**-24, 2.0**-14),
    (1.0, 2.0**-26, torch.float32, 1.0, 1.0 + 2.0**-23),
    (1.0, -(2.0**-26), torch.float32, 1.0 - 2.0**-24, 1.0),
    (-1.0, 2.0**-26, torch.float32, -1.0, -1.0 + 2.0**-24),
    (-5.0, -(2.0**-23), torch.float32, -5.0 - 2.0**-21, -5.0),
    (1.0, 2.0**-54, torch.float64, 1.0, 1.0 + 2.0**-52),
    (1.0, -(2.0**-55), torch.float64, 1.0 - 2.0**-53, 1.0),
]


@pytest.mark.parametrize(("x", "error", "dtype", "low", "high"), BETWEEN)
def test_the_mean_is_the_number_and_only_its_neighbors_come(x, error, dtype, low, high):
    n = 100_000
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = rounded(torch.full((n,), x, dtype=wide), dtype, error=torch.full((n,), error, dtype=wide))
    assert values.dtype == dtype
    assert set(values.unique().tolist()) == {low, high}
    # The share that goes up, exactly: fp64 cannot hold x + error of fp64.
    share = (Fraction(x) + Fraction(error) - Fraction(low)) / (Fraction(high) - Fraction(low))
    count = int((values == high).sum())
    assert abs(count - n * float(share)) < 5 * (n * float(share * (1 - share))) ** 0.5


@pytest.mark.parametrize("dtype", HALVES)
def test_what_can_be_represented_never_moves(dtype):
    x = every_pattern(dtype)
    for step in range(3):
        assert torch.equal(rounded(x, dtype, KEY._replace(step=step)).float().view(torch.int32), x.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sum_without_an_error_never_moves(dtype):
    x = WIDE.to(dtype)
    assert torch.equal(rounded(x, dtype), x)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_nan_and_infinity_are_what_they_are(dtype):
    n = 1000
    for x in (torch.nan, torch.inf, -torch.inf):
        for error in (0.0, torch.nan):
            values = rounded(torch.full((n,), x), dtype, error=torch.full((n,), error))
            torch.testing.assert_close(values, torch.full((n,), x, dtype=dtype), rtol=0, atol=0, equal_nan=True)


def test_no_payload_of_a_nan_is_cut_off_or_carried_away():
    bits = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], dtype=np.uint32)
    assert rounded(torch.from_numpy(bits.view(np.float32)).repeat(100), torch.bfloat16).isnan().all()


def test_beyond_the_largest_fp16_the_nearest_is_taken():
    x = torch.tensor([65504.0, 65519.0, 65520.0, -65520.0, 1e38]).repeat(100)
    assert torch.equal(rounded(x, torch.float16), x.half())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("other", [{"seed": 10}, {"step": 5}, {"tensor_id": 7}], ids=str)
def test_the_key_decides(dtype, other):
    first = rounded(WIDE, dtype)
    assert torch.equal(rounded(WIDE.clone(), dtype), first)
    # The numbers of rounding have their own domain, whatever the key is for.
    assert torch.equal(rounded(WIDE, dtype, KEY._replace(domain=1)), first)
    assert (rounded(WIDE, dtype, KEY._replace(**other)) != first).float().mean() > 0.1


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 4, 5)])
@pytest.mark.parametrize("dtype", HALVES)
def test_elements_are_numbered_row_major(shape, dtype):
    x = draw(shape)
    backwards = tuple(reversed(range(x.ndim)))
    permuted = x.permute(backwards).contiguous().permute(backwards)
    flat = rounded(x.reshape(-1), dtype)
    assert torch.equal(rounded(permuted, dtype), flat.view(shape))


FLOATS = st.floats(-(2.0**126), 2.0**126, width=32)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(FLOATS, FLOATS)
def test_the_error_of_a_sum_is_exact(a, b):
    s, error = two_sum(torch.tensor(a), torch.tensor(b))
    assert s == torch.tensor(a) + torch.tensor(b)
    assert Fraction(s.item()) + Fraction(error.item()) == Fraction(a) + Fraction(b)


def test_the_error_of_a_sum_in_fp64():
    s, error = two_sum(torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0**-60, dtype=torch.float64))
    assert (s.item(), error.item()) == (1.0, 2.0**-60)


def patterns():
    """Every upper half with the lower halves around the ends and the middle, as int64 of 32 bits."""
    low = np.array([0, 1, 0x1234, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return (np.arange(2**16)[:, None] * 65536 + low).reshape(-1)


def test_a_split_restores_every_pattern():
    bits = patterns().astype(np.uint32)
    x = torch.from_numpy(bits.view(np.float32))
    weight, low = split(x)
    assert (weight.dtype, low.dtype) == (torch.bfloat16, torch.int16)
    restored = join(weight, low).numpy().view(np.uint32)
    nan = x.isnan().numpy()
    assert nan.sum() > 1000
    assert np.array_equal(restored[~nan], bits[~nan])
    assert np.array_equal(restored[nan], np.full(nan.sum(), 0x7FC00000))
    assert torch.equal(weight.isnan(), x.isnan())


def test_the_weight_of_a_split_is_the_nearest_with_ties_away_from_zero():
    bits = patterns()
    x = torch.from_numpy(bits.astype(np.uint32).view(np.float32))
    keep = (~x.isnan()).numpy()
    weight = split(x)[0].view(torch.int16).numpy().view(np.uint16).astype(np.int64)
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    assert np.array_equal(weight[keep], ((sign << 15) | ((magnitude * 2 + 65536) // 131072))[keep])
    # Half a unit of the last place, by values; towards infinity there is no unit.
    finite = magnitude < 0x7F7F0000

    def value(upper):
        return (upper[finite] * 65536).astype(np.uint32).view(np.float32).astype(np.float64)

    unit = value(magnitude // 65536 + 1) - value(magnitude // 65536)
    assert (np.abs(value(weight) - x.double().numpy()[finite]) <= unit / 2).all()


def test_ties_by_hand():
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7.
    weight, low = split(torch.tensor([1.0 + 2.0**-8, -1.0 - 2.0**-8, 1.0 + 2.0**-8 - 2.0**-23, -0.0]))
    assert weight.tolist() == [1.0 + 2.0**-7, -1.0 - 2.0**-7, 1.0, 0.0]
    assert low.tolist() == [-0x8000, -0x8000, 0x7FFF, 0]
    assert weight[3].signbit()


def test_a_weight_set_from_outside_survives_any_low_half():
    weight = torch.tensor([0.0, -0.0, 1.0, torch.inf, -torch.inf, 1e-40], dtype=torch.bfloat16)
    for low in (-0x8000, -1, 0, 1, 0x7FFF):
        restored = join(weight, torch.full((6,), low, dtype=torch.int16))
        assert not restored.isnan().any()
        # At the very bottom of a pattern's range a split would choose the same weight again.
        assert torch.equal(split(restored)[0], weight)


SLOW = {"lr": 5e-6, "betas": (0.9, 0.95), "alpha": 1e-4, "reserve_rate": 0.5}


@cache
def trained(dtype, gradient, n=64, tau=1e-4, steps=200, **options):
    """Train bf16 numbers; the gradients are bf16 numbers too, so that every dtype gets the same."""
    start = draw(n).bfloat16().float()
    param = parameter(start, dtype)
    optimizer = optimizer_of(param, draw(n, tau, 1), **SLOW | options)
    for step in range(steps):
        param.grad = gradient(step, n).bfloat16().to(dtype)
        optimizer.step()
    return start, param.detach(), optimizer.state[param]


def noise(step, n):
    return draw(n, 1.0, step) + 0.5


def uphill(step, n):
    return torch.ones(n)


@pytest.mark.parametrize("dtype", HALVES)
def test_after_many_steps_masters_are_where_fp32_is(dtype):
    # fp16 holds bf16 numbers of this size exactly.
    start, fp32, _ = trained(torch.float32, noise)
    assert not torch.equal(fp32.bfloat16(), start.bfloat16())
    _, weight, state = trained(dtype, noise, master="fp32")
    assert torch.equal(state["master"], fp32)
    assert torch.equal(weight, fp32.to(dtype))
    if dtype == torch.bfloat16:
        _, weight, state = trained(dtype, noise, master="split")
        assert torch.equal(join(weight, state["master_low"]), fp32)
        assert torch.equal(weight, split(fp32)[0])


def test_without_a_master_bf16_weights_stay_where_they_are():
    start, fp32, _ = trained(torch.float32, noise)
    _, nearest, _ = trained(torch.bfloat16, noise)
    large = start.abs() > 0.1
    assert large.sum() > 40
    assert torch.equal(nearest[large].float(), start[large])
    assert ((fp32 - start)[large].abs() > 1e-5).all()


def test_on_average_stochastic_bf16_drifts_as_fp32_does():
    n, steps = 4096, 100
    start, fp32, _ = trained(torch.float32, uphill, n, steps=steps, lr=1e-5)
    _, weight, _ = trained(torch.bfloat16, uphill, n, steps=steps, lr=1e-5, rounding="stochastic")
    drift, expected = (weight.float() - start).double(), (fp32 - start).double()
    # u = -lr at every step and a half of them, doubled, is taken; tau and decay average out.
    assert abs(expected.mean() + steps * 1e-5) < 5e-5
    # Each element is off by rounding of its own: the standard error of the mean says by how much together.
    assert abs((drift - expected).mean()) < 5 * (drift - expected).std() / n**0.5
    assert 5 * (drift - expected).std() / n**0.5 < 0.25 * abs(expected.mean())
    _, nearest, _ = trained(torch.bfloat16, uphill, n, steps=steps, lr=1e-5)
    assert abs((nearest.float() - start).double().mean()) < 0.1 * abs(expected.mean())


def test_stochastic_fp32_weights_add_what_nearest_loses():
    # alpha * tau = 2^-26 to weights of 1, whose next number is 2^-23 away: 40 steps are 5 such gaps.
    n, steps = 4096, 40
    moved = {}
    for rounding in ("nearest", "stochastic"):
        param = nn.Parameter(torch.ones(n))
        optimizer = optimizer_of(
            param, torch.full((n,), 2.0**-6), alpha=2.0**-20, weight_decay=0.0, reserve_rate=1.0, rounding=rounding
        )
        for _ in range(steps):
            param.grad = torch.zeros(n)
            optimizer.step()
        moved[rounding] = (param.detach().double() - 1).mean().item() / 2.0**-23
    assert moved["nearest"] == 0.0
    # Each of n * steps draws moves a gap with probability 1/8.
    assert abs(moved["stochastic"] - 5) < 5 * (steps * 0.125 * 0.875 / n) ** 0.5


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_stochastic_weights_are_a_run_that_can_be_repeated(dtype):
    runs = [trained(dtype, noise, steps=5, rounding="stochastic", lr=1e-3, seed=seed)[1] for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_weight_changed_from_outside_overrules_its_fp32_master():
    weights = torch.tensor([1.0, 2.0, 3.0, torch.nan], dtype=torch.bfloat16)
    param = nn.Parameter(weights.clone())
    options = SLOW | {"lr": 2.0**-12, "weight_decay": 0.0, "reserve_rate": 1.0}
    optimizer = optimizer_of(param, torch.zeros(4), master="fp32", **options)
    param.grad = torch.ones(4, dtype=torch.bfloat16)
    optimizer.step()
    state = optimizer.state[param]
    first = state["master"].clone()
    assert torch.equal(param[:3], weights[:3])
    assert (first[:3] < weights[:3].float()).all()
    with torch.no_grad():
        param[1] = 5.0
        param[3] = 7.0
    optimizer.step()
    step = first[0] - state["master"][0]
    assert 0.9 * 2.0**-12 < step < 1.1 * 2.0**-12
    # Two steps of the third; of the others one, from where they were put.
    expected = torch.tensor([1.0, 5.0, 3.0, 7.0]) - step * torch.tensor([2.0, 1.0, 2.0, 1.0])
    assert (state["master"] - expected).abs().max() < 1e-6
    assert torch.equal(param.detach(), state["master"].bfloat16())


def test_a_weight_set_to_zero_under_a_split_master_goes_on_from_there():
    param = nn.Parameter(draw(200).bfloat16())
    optimizer = optimizer_of(param, draw(200, 1e-3, 1), master="split", **SLOW | {"lr": 1e-4})
    param.grad = torch.ones(200, dtype=torch.bfloat16)
    optimizer.step()
    assert (optimizer.state[param]["master_low"] < 0).any()
    param.detach().zero_()
    optimizer.step()
    assert param.abs().max() < 1e-3
    # About half of the elements are kept, and each of those moves by 2 * lr.
    assert 60 < (param < -1e-4).sum() < 140


@pytest.mark.parametrize(
    ("dtype", "options", "sentence"),
    [
        (torch.float16, {"master": "split"}, "'w' is torch.float16, and only bf16 is the upper half of fp32; use mas"),
        (torch.float32, {"master": "split"}, "'w' is torch.float32 and needs no master; use master='none' for its gr"),
        (torch.float32, {"master": "fp32"}, "'w' is torch.float32 and needs no master; use master='none' for its gr"),
        (torch.float64, {"master": "fp32"}, "'w' is torch.float64 and needs no master; use master='none' for its gr"),
    ],
)
def test_masters_that_a_dtype_cannot_have_are_refused(dtype, options, sentence):
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = optimizer_of(param, torch.ones(3), **options)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=sentence):
        optimizer.step()
    assert torch.equal(param, torch.ones(3, dtype=dtype))
    assert not optimizer.state
