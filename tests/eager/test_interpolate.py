"""Eager against float64 and by hand; the kernel against eager, bit for bit."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits, bits, same_bits
from device import DEVICE
from one_tensor import draw

from fused_merge import functional
from fused_merge.eager import interpolate as eager
from fused_merge.eager.interpolate import interpolate as point
from fused_merge.eager.interpolate import interpolate_

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RATIOS = [0.0, 1e-9, 0.1, 0.4999, 0.5, 0.9, 1.0, 1.3, -0.2]


def pair(n, dtype, seed=0):
    base = draw(n, 0.02, seed)
    return base.to(dtype), (base + draw(n, 1e-3, seed + 1)).to(dtype)


def one_by_one(base, tuned, ratios=RATIOS):
    return [point(base, tuned, ratio) for ratio in ratios]


def test_by_hand():
    base, tuned = torch.tensor([1.0, -2.0, 4.0]), torch.tensor([3.0, 2.0, 4.0])
    assert point(base, tuned, 0.25).tolist() == [1.5, -1.0, 4.0]
    assert point(base, tuned, 0.75).tolist() == [2.5, 1.0, 4.0]
    assert point(base, tuned, 2.0).tolist() == [5.0, 6.0, 4.0]
    assert point(base, tuned, -1.0).tolist() == [-1.0, -6.0, 4.0]
    # And fp64 is computed in fp64.
    assert point(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 0.1).item() == 0.1


def test_each_ratio_starts_from_its_nearer_end():
    # b - a = 1e8 loses the 1; from the nearer end the 1 is still there.
    base, tuned = torch.tensor([1.0]), torch.tensor([1e8])
    assert point(base, tuned, 1e-9).item() == pytest.approx(1.1, rel=1e-6)
    base, tuned = torch.tensor([-1e8]), torch.tensor([1.0])
    assert point(base, tuned, 1.0 - 1e-9).item() == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_ends_are_copied_bit_for_bit(dtype):
    strange = torch.tensor([-0.0, 0.0, float("inf"), -float("inf"), 1e-40, 3.0])
    nan = (
        torch.tensor([0x7FC1], dtype=torch.int16).view(torch.bfloat16)
        if dtype == torch.bfloat16
        else torch.tensor([torch.nan])
    )
    base = torch.cat([strange.to(dtype), nan.to(dtype)])
    tuned = base.flip(0).clone()
    assert_same_bits(one_by_one(base, tuned, [0.0, 1.0]), [base, tuned])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.9, 1.5])
def test_almost_every_element_is_the_nearest(dtype, ratio):
    base, tuned = pair(200_000, dtype)
    ours = point(base, tuned, ratio)
    exact = base.double() + ratio * (tuned.double() - base.double())
    if dtype == torch.float32:
        # fp32 in and out: the difference, the product and the sum are each rounded.
        scale = torch.stack([base.double(), tuned.double(), exact]).abs().amax(0)
        assert ((ours.double() - exact).abs() <= 2**-23 * scale).all()
    else:
        ulps = (bits(ours).int() - bits(exact.to(dtype)).int()).abs()
        assert (ulps != 0).float().mean() <= 1e-4
        assert ulps.max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_equals_eager_on_many_tensors(dtype):
    sizes = [1, 0, 127, 1024, 1025, 20_003]
    pairs = [tuple(x.to(DEVICE) for x in pair(n, dtype, seed=n)) for n in sizes]
    bases, tuneds = zip(*pairs, strict=True)
    by_kernel = functional.interpolate(bases, tuneds, RATIOS, impl="triton")
    by_eager = functional.interpolate(bases, tuneds, RATIOS, impl="eager")
    assert_same_bits(by_kernel, by_eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_keeps_the_bits_of_special_values(dtype):
    base = torch.tensor([-0.0, torch.nan, torch.inf, 1e-40, 1.0], device=DEVICE).to(dtype)
    tuned = torch.tensor([0.0, 2.0, -torch.inf, -0.0, torch.nan], device=DEVICE).to(dtype)
    (points,) = functional.interpolate([base], [tuned], [0.0, 1.0, 0.5], impl="triton")
    assert_same_bits(points[:2], [base, tuned])
    (expected,) = functional.interpolate([base], [tuned], [0.5], impl="eager")
    torch.testing.assert_close(points[2], expected[0], rtol=0, atol=0, equal_nan=True)


def test_kernel_writes_only_its_outputs_and_unaligned_views():
    base, tuned = (x.to(DEVICE) for x in pair(3001, torch.float32))
    buffer = torch.full((3 * 3010,), 7.0, device=DEVICE)
    outs = [buffer[1 + 3005 * k : 1 + 3005 * k + 3000] for k in range(2)]
    functional.interpolate([base[1:]], [tuned[1:]], [0.25, 0.75], [outs], impl="triton")
    assert_same_bits(outs, one_by_one(base[1:], tuned[1:], (0.25, 0.75)))
    untouched = torch.ones_like(buffer, dtype=torch.bool)
    for k in range(2):
        untouched[1 + 3005 * k : 1 + 3005 * k + 3000] = False
    assert (buffer[untouched] == 7.0).all()


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_an_output_may_be_one_of_its_inputs(impl):
    base, tuned = (x.to(DEVICE) for x in pair(2000, torch.bfloat16))
    expected = point(base, tuned, 0.3)
    functional.interpolate([base], [tuned], [0.3], [[base]], impl=impl)
    assert torch.equal(base, expected)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_each_tensor_may_have_its_own_ratios(impl):
    base, tuned = (x.to(DEVICE) for x in pair(1500, torch.float32))
    points = functional.interpolate([base, base], [tuned, tuned], [[0.1, 0.2], [0.3, 1.0]], impl=impl)
    assert_same_bits(points, [one_by_one(base, tuned, ratios) for ratios in ([0.1, 0.2], [0.3, 1.0])])


def test_the_block_size_does_not_show():
    from fused_merge.kernels.interpolate import interpolate as launch

    base, tuned = (x.to(DEVICE) for x in pair(5000, torch.bfloat16))
    for block in (256, 1024, 8192):
        outs = [torch.empty_like(base) for _ in RATIOS]
        launch([base], [tuned], [RATIOS], [outs], block=block)
        assert_same_bits(outs, one_by_one(base, tuned))


def test_strided_tensors_fall_back_to_eager_and_are_refused_by_name_of_triton():
    base, tuned = (x.view(40, 50).t().to(DEVICE) for x in pair(2000, torch.float32))
    (points,) = functional.interpolate([base], [tuned], [0.3])
    assert torch.equal(points[0], point(base, tuned, 0.3))
    with pytest.raises(RuntimeError, match="impl='triton' cannot serve tensor 0: the kernel takes contiguous tensors"):
        functional.interpolate([base], [tuned], [0.3], impl="triton")


# One point, two of one weight, two of two, and ends alone: each uses other temporaries.
@pytest.mark.parametrize("ratios", [[0.3], [0.7], [0.25, 0.75], [0.25, 0.3], [1.0, 0.5], [0.0, 1.0], RATIOS])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_many_ratios_block_by_block_are_the_points_one_by_one(ratios, dtype, monkeypatch):
    # Blocks of at most 4096 elements in fp32.
    monkeypatch.setattr(eager, "_SCRATCH", 5 << 14)
    for numel in (0, 1, 2**12 - 1, 2**12 + 1, 3 * 2**15 + 5):
        base, tuned = pair(numel, dtype)
        outs = [torch.empty_like(base) for _ in ratios]
        interpolate_(base, tuned, ratios, outs)
        assert_same_bits(outs, one_by_one(base, tuned, ratios))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("end", [0, 1])
def test_one_point_may_take_the_place_of_an_end(ratio, dtype, end, monkeypatch):
    monkeypatch.setattr(eager, "_SCRATCH", 5 << 14)
    ends = pair(3 * 2**15 + 5, dtype)
    expected = point(*ends, ratio)
    interpolate_(*ends, [ratio], [ends[end]])
    assert same_bits(ends[end], expected)


@pytest.mark.parametrize("nbytes", [64, 1001, 2**16, 2**20])
@pytest.mark.parametrize("ratios", [[0.3], RATIOS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scratch_of_any_size_changes_no_bit(nbytes, ratios, dtype):
    base, tuned = pair(999, dtype)
    scratch = torch.full([nbytes], 0xFF, dtype=torch.uint8)
    points = [torch.empty_like(base) for _ in ratios]
    interpolate_(base, tuned, ratios, points, scratch)
    assert_same_bits(points, one_by_one(base, tuned, ratios))
    assert not scratch.eq(0xFF).all()


def test_ends_and_outputs_of_several_dtypes():
    base, tuned = pair(1000, torch.float64)
    mixed = base.float(), tuned.bfloat16()
    outs = [torch.empty(1000, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64)]
    functional.interpolate(*([end] for end in mixed), [0.3, 0.7, 1.0], [outs])
    for out, ratio in zip(outs, [0.3, 0.7, 1.0], strict=True):
        assert torch.equal(out, point(*(end.float() for end in mixed), ratio).to(out.dtype))
    with pytest.raises(RuntimeError, match="cannot serve tensor 0: the kernel takes ends and outputs of one dtype"):
        functional.interpolate(*([end.to(DEVICE)] for end in mixed), [0.3], impl="triton")


ONES = torch.ones(3)


@pytest.mark.parametrize(
    ("base", "tuned", "ratios", "outs", "sentence"),
    [
        (ONES, ONES, [0.5, float("nan")], None, "a ratio must be finite, got nan"),
        (ONES, ONES, [float("inf")], None, "a ratio must be finite, got inf"),
        (ONES, torch.ones(4), [0.5], None, r"tensor 0: base is \(3,\) torch.float32 on cpu and another.*\(4,\)"),
        (ONES, ONES.int(), [0.5], None, "only floating tensors can be interpolated, got torch.int32"),
        (ONES.int(), ONES.int(), [0.5], None, "only floating tensors can be interpolated, got torch.i"),
        (ONES, ONES, [0.1, 0.2], [[ONES.clone()]], "tensor 0: 2 ratios need as many outputs, got 1"),
    ],
)
def test_bad_input_is_named(base, tuned, ratios, outs, sentence):
    with pytest.raises(ValueError, match=sentence):
        functional.interpolate([base], [tuned], ratios, outs)
