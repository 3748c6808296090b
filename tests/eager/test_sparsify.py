from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from device import DEVICE
from hypothesis import given
from hypothesis import strategies as st
from one_tensor import draw
from tensors import Tensors

from fused_merge import functional
from fused_merge.eager.philox import DOMAIN_UPDATE, MaskKey
from fused_merge.eager.sparsify import SPARSIFY, kept_count, magnitude, none, random, soft_threshold, sparsify_tau
from fused_merge.names import tensor_id

NAN, INF = float("nan"), float("inf")
KEY = MaskKey(seed=9, step=4, tensor_id=tensor_id("a.weight"), domain=DOMAIN_UPDATE)


@pytest.mark.parametrize(
    ("function", "values", "rate", "kept"),
    [
        # k = floor(0.4 * 5) = 2: the magnitudes 4 and 3.
        (magnitude, [1.0, -4.0, 0.5, 3.0, -2.0], 0.4, [0.0, -4.0, 0.0, 3.0, 0.0]),
        # k = 1, and three elements share the largest magnitude; k = 3 reaches the ones.
        (magnitude, [2.0, -2.0, 1.0, 2.0], 0.25, [2.0, -2.0, 0.0, 2.0]),
        (magnitude, [2.0, -2.0, 1.0, -1.0], 0.75, [2.0, -2.0, 1.0, -1.0]),
        (magnitude, [3.0, -3.0, 3.0], 0.34, [3.0, -3.0, 3.0]),
        # At least one.
        (magnitude, [1.0, -4.0, 3.0], 0.01, [0.0, -4.0, 0.0]),
        (magnitude, [0.25], 0.01, [0.25]),
        (magnitude, [1.0, INF, -INF, -5.0], 0.5, [0.0, INF, -INF, 0.0]),
        # NaN is larger than infinity.
        (magnitude, [1.0, NAN, INF, -5.0], 0.25, [0.0, NAN, 0.0, 0.0]),
        # k = 2: every magnitude shrinks by 3; what is at or below it is gone. k = 3: by 2.
        (soft_threshold, [1.0, -4.0, 0.5, 3.0, -2.0], 0.4, [0.0, -1.0, 0.0, 0.0, 0.0]),
        (soft_threshold, [1.0, -4.0, 0.5, 3.0, -2.0], 0.6, [0.0, -2.0, 0.0, 1.0, 0.0]),
        (soft_threshold, [1.0, -INF, 3.0], 0.67, [0.0, -INF, 0.0]),
        (soft_threshold, [1.0, NAN, -4.0, 3.0], 0.5, [0.0, NAN, 0.0, 0.0]),
        # An infinite threshold.
        (soft_threshold, [1.0, INF, 3.0], 0.34, [0.0, 0.0, 0.0]),
    ],
)
def test_by_hand(function, values, rate, kept):
    ours = function(torch.tensor(values), rate, KEY)
    torch.testing.assert_close(ours, torch.tensor(kept), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SPARSIFY)
def test_one_and_nothing(name):
    x = torch.tensor([1.0, -2.0, 3.0])
    assert SPARSIFY[name](x, 1.0, KEY) is x
    assert SPARSIFY[name](torch.zeros(0), 0.5, KEY).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_magnitudes_equal_a_sort(dtype):
    x = torch.randn(37, 53, dtype=dtype, generator=torch.Generator().manual_seed(0))
    for rate in (0.001, 0.1, 0.77, 0.999):
        expected = np.where(reference.top(x.numpy(), rate), x.numpy(), 0)
        assert np.array_equal(magnitude(x, rate, KEY).numpy(), expected)
        threshold = np.sort(np.abs(x.numpy()), axis=None)[-kept_count(x.numel(), rate)]
        expected = np.sign(x.numpy()) * np.maximum(np.abs(x.numpy()) - threshold, 0)
        assert np.array_equal(soft_threshold(x, rate, KEY).numpy(), expected)


def test_random_equals_an_independent_mask():
    x = torch.randn(30, 40, generator=torch.Generator().manual_seed(0))
    keep = reference.keep(1200, 0.2, 9, 4, "a.weight", 0).reshape(30, 40)
    assert np.array_equal(random(x, 0.2, KEY).numpy(), np.where(keep, x.numpy(), 0))


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40), st.floats(0.001, 1.0))
def test_what_is_kept_is_never_smaller_than_what_is_dropped(values, rate):
    x = torch.tensor(values, dtype=torch.float32)
    kept = magnitude(x, rate, KEY)
    keep = kept != 0
    assert torch.equal(kept[keep], x[keep])
    assert keep.sum() >= min(kept_count(len(values), rate), int((x != 0).sum()))
    if keep.any() and not keep.all():
        assert x[keep].abs().min() > x[~keep].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tau_is_drawn_in_its_own_domain_at_step_zero(dtype):
    tau = torch.randn(30, 40).to(dtype)
    expected = torch.from_numpy(reference.keep(1200, 0.2, 9, 0, "a.weight", 1).reshape(30, 40))
    for name in ("a.weight", "module.a.weight"):
        drawn = sparsify_tau(tau, name=name, method="random", reserve_rate=0.2, seed=9)
        assert drawn.dtype == dtype
        assert torch.equal(drawn, torch.where(expected, tau, 0))


def test_tau_by_magnitude_and_whole():
    tau = torch.tensor([1.0, -4.0, 0.5, 3.0]).bfloat16()
    by_magnitude = sparsify_tau(tau, name="a", method="magnitude", reserve_rate=0.5, seed=0)
    assert by_magnitude.tolist() == [0.0, -4.0, 0.0, 3.0]
    assert torch.equal(sparsify_tau(tau, name="a", method="none", reserve_rate=0.5, seed=0), tau)
    assert none(tau, 0.5, KEY) is tau


def test_an_unknown_way_is_named():
    with pytest.raises(ValueError, match="unknown way to sparsify a reference delta: 'top'; use one of 'none'"):
        sparsify_tau(torch.ones(3), name="a", method="top", reserve_rate=0.5, seed=0)


def kept_by_the_kernels(x, rate, starts=()):
    """Return F(u) of a step with u = -x, searched for from nowhere, and again from each of these last thresholds."""
    workspace, tensors, kept = functional.Workspace(), Tensors(x.shape), []
    tensors.grads, tensors.taus = [x.to(DEVICE)], [torch.zeros_like(x, device=DEVICE)]
    tensors.start()
    for start in (None, *starts):
        tensors.params[0].zero_()
        if start is not None:
            (launch,) = workspace.keep(("step", "triton", DEVICE), None)._launches
            launch.thresholds.fill_(start)
        # With eps so large that it is the denominator: u = -x * lr / eps = -x.
        tensors.step(
            "triton", workspace=workspace, method="onties", reserve_rate=rate, lr=2.0**40, eps=2.0**40,
            betas=(0.0, 0.0), weight_decay=0.0, alpha=0.0,
        )  # fmt: skip
        kept.append(tensors.params[0].to("cpu", copy=True))
    return kept


SEARCHED = {
    "normal": draw(1500),
    "ties": torch.randint(-3, 4, (1500,), generator=torch.Generator().manual_seed(1)).float() / 4,
    "constant": torch.full((1500,), 0.5),
    "zeros": torch.zeros(1500),
    "subnormal": draw(1500, 1e-40, 2),
    "wide": draw(1500, 1.0, 3) * 2.0 ** torch.linspace(-120, 14, 1500),
}


@pytest.mark.parametrize(
    ("name", "k"),
    [
        *(("normal", k) for k in (1, 2, 15, 750, 1499)),
        *((name, k) for name in ("ties", "subnormal", "wide") for k in (1, 750, 1499)),
        # All thresholds of these are one.
        *((name, 15) for name in ("constant", "zeros")),
    ],
)
def test_the_search_finds_the_kth_largest_from_wherever_it_starts(name, k):
    x = SEARCHED[name]
    # Half a step above k/n, so that floor(rate * n) is k.
    rate = (k + 0.5) / x.numel()
    kth = int(x.abs().view(torch.int32).kthvalue(x.numel() - k + 1).values)
    half = 1 << 18
    starts = [kth, kth + 1, kth + half, kth + half + 1, kth - half + 1, kth - half, 0, 0x7F800000, 0x7FFFFFFF]
    expected = np.where(reference.top(x.numpy(), rate), -x.numpy(), np.float32(0.0))
    for kept in kept_by_the_kernels(x, rate, [min(max(start, 0), 0x7FFFFFFF) for start in starts]):
        assert np.array_equal(kept.numpy(), expected)


def test_the_search_counts_nan_as_the_largest():
    x = torch.tensor([1.0, NAN, 3.0, -5.0, NAN, 2.0, 0.5, 4.0])
    for k, found in ((1, [1, 4]), (2, [1, 4]), (3, [1, 3, 4]), (4, [1, 3, 4, 7])):
        for kept in kept_by_the_kernels(x, (k + 0.5) / 8, [0x7FC00000, 0x40A00000, 0]):
            assert (kept != 0).nonzero().flatten().tolist() == found


def test_where_the_window_holds_the_threshold_only_what_is_listed_is_counted(monkeypatch):
    from fused_merge.kernels import kth_largest, launch

    searches = []
    step = launch.Launch._step

    def watched(self, table, coefficients, search, marks):
        searches.append(search)
        return step(self, table, coefficients, search, marks)

    monkeypatch.setattr(launch.Launch, "_step", watched)
    x = SEARCHED["normal"]
    kth = int(x.abs().view(torch.int32).kthvalue(x.numel() - 14).values)
    kept_by_the_kernels(x, 15.5 / 1500, [kth, kth + (1 << 19), kth - (1 << 19)])
    listed = [search[0, kth_largest.SEARCH.listed].item() for search in searches]
    # From nowhere; a window around it; one above it; one below it.
    assert listed[0] == listed[2] == listed[3] == -1
    low, last = kth - (1 << 18), kth + (1 << 18) - 1
    patterns = x.abs().view(torch.int32)
    assert listed[1] == ((patterns >= low) & (patterns <= last)).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_nan_has_one_magnitude(dtype):
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    patterns = torch.tensor([torch.iinfo(integers).max, -1, 0], dtype=integers).view(dtype)
    x = torch.cat([patterns, torch.tensor([torch.nan, torch.inf, 2.0], dtype=dtype)])
    kept = SPARSIFY["magnitude"](x, 0.2, None)
    assert kept.isnan().tolist() == [True, True, False, True, False, False]
    assert kept[[2, 4, 5]].tolist() == [0.0] * 3


def test_a_window_with_more_in_it_than_the_list_holds_is_not_trusted():
    # 1500 elements have a list of 512 in the interpreter's blocks; all 1500 lie in one window.
    x = torch.linspace(1.0, 1.01, 1500)
    for kept in kept_by_the_kernels(x, 0.3, [int(torch.tensor(1.005).view(torch.int32))] * 2):
        assert torch.equal(kept, torch.where(x >= x[1500 - 450], -x, 0.0))


def test_a_search_goes_through_every_block_of_a_tensor(monkeypatch):
    from fused_merge.kernels import kth_largest, launch

    prepare, block = launch.prepare, 1024
    monkeypatch.setattr(launch, "prepare", lambda *args, **kwargs: prepare(*args, **kwargs, block=block))
    # Two groups of two blocks, and an end.
    monkeypatch.setattr(kth_largest, "PROGRAMS", 2)
    n = 4 * block + 100
    # Ascending: the k largest lie in the last blocks, or reach from there far down.
    x = torch.linspace(1e-3, 1.0, n)
    for k in (50, 3000, n - 10):
        kth = int(x[n - k].view(torch.int32))
        for kept in kept_by_the_kernels(x, (k + 0.5) / n, [kth]):
            assert torch.equal(kept, torch.where(x >= x[n - k], -x, 0.0))
