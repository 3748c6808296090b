from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import reference
import torch
from bits import same_bits
from hypothesis import given
from hypothesis import strategies as st
from merge_models import random_models as models

from fused_merge.eager.merge import (
    Coefficients,
    consensus,
    drop_by_rank,
    mask_key,
    merge,
    merge_block,
    trim,
    trim_bounds,
)
from fused_merge.eager.shard import ShardIndex
from fused_merge.methods import MARGINS, MERGE_METHODS, merge_method

NAN, INF = float("nan"), float("inf")
NAME = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = [0.7, -0.4, 1.3]
DENSITIES = [0.3, 0.55, 1.0]


# Of methods whose weights are given, and of all with so many models, and such weights, as they take.
GIVEN = [name for name, entry in MERGE_METHODS.items() if entry.weights_from == "given"]
TAKEN = dict.fromkeys(GIVEN, WEIGHTS) | {"slerp": [0.5], "nearswap": [0.5], "nuslerp": [0.7, -0.4]}
TAKEN["model_stock"] = [1.0] * 3


# --- the papers once more, in numpy, an element at a time


def voted(terms, weights, elect, normalize):
    """The merge of one element: the terms are the weighted deltas."""
    zero = terms[0] - terms[0]
    chosen = list(range(len(terms)))
    if elect:
        sign = 1 if sum(terms, zero) >= 0 else -1
        chosen = [i for i in chosen if terms[i] * sign > 0]
    total = sum((terms[i] for i in chosen), zero)
    mass = sum((weights[i] for i in chosen), zero)
    return total / mass if normalize and mass != 0 else total


def summed(deltas, weights, elect, normalize):
    weights = [deltas[0].dtype.type(w) for w in weights]
    terms = np.stack([w * d.ravel() for w, d in zip(weights, deltas, strict=True)], 1)
    merged = [voted(own, weights, elect, normalize) for own in terms]
    return np.array(merged, deltas[0].dtype).reshape(deltas[0].shape)


def expected(base, thetas, weights, keeps, *, elect, normalize, divide_by, scale):
    deltas = [
        np.where(keep, theta - base, 0) / base.dtype.type(p)
        for theta, keep, p in zip(thetas, keeps, divide_by, strict=True)
    ]
    return base + base.dtype.type(scale) * summed(deltas, weights, elect, normalize)


def as_numpy(tensors):
    return [tensor.double().numpy() if tensor.dtype == torch.float64 else tensor.float().numpy() for tensor in tensors]


def assert_merged(got, want, dtype):
    """The same bits, where the calculation in numpy is rounded once to the dtype of the result."""
    assert got.dtype == dtype
    assert torch.equal(got, torch.as_tensor(want).to(dtype))


ALL_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])


def crumbs(x, density, gamma):
    """What breadcrumbs keep: neither the largest gamma*n nor, of the others, more than the density allows."""
    sizes = np.sort(np.abs(x), axis=None)[::-1]
    kept = int(density * x.size)
    middle = sizes[min(int(gamma * x.size), x.size - kept) :][:kept]
    return (middle[-1] <= np.abs(x)) & (np.abs(x) <= middle[0])


def ranked(x, density, epsilon):
    """The probability with which MAGPRUNE keeps each element: it grows in equal steps along a sorted row."""
    p = np.empty(x.shape)
    for row, of_row in zip(x, p, strict=True):
        for rank, element in enumerate(np.argsort(np.abs(row), kind="stable")):
            of_row[element] = density - epsilon + 2 * epsilon * (rank / (len(row) - 1))
    return p


@ALL_DTYPES
@pytest.mark.parametrize("choice", [None, True, False])
@pytest.mark.parametrize("method", GIVEN)
def test_methods_are_what_their_papers_say(method, choice, dtype):
    """The choice is to normalize, for DARE and DELLA to rescale."""
    base, thetas = models((19, 23), dtype)
    first, *rest = as_numpy([base, *thetas])
    asked, densities, divide_by = {"normalize": choice}, None, [1.0] * 3
    keeps, normalize, scale = [True] * 3, MERGE_METHODS[method].normalize if choice is None else choice, 0.8
    if method == "ties":
        densities = DENSITIES
        keeps = [reference.top(theta - first, p) for theta, p in zip(rest, densities, strict=True)]
    elif "crumbs" in method:
        densities, asked["margins"] = DENSITIES, [0.1, 0.6, 0.2]
        keeps = [crumbs(theta - first, *each) for theta, *each in zip(rest, densities, asked["margins"], strict=True)]
    elif "della" in method:
        densities, asked, normalize = DENSITIES, {"rescale": choice, "margins": [0.2, 0.45, 0.9]}, method == "della"
        ps = [ranked(rest[i] - first, densities[i], asked["margins"][i]) for i in range(2)]
        words = [reference.words(437, 11, i, NAME, 1).reshape(19, 23) for i in range(2)]
        keeps = [word < np.floor(p * 2.0**32) for word, p in zip(words, ps, strict=True)] + [True]
        divide_by = divide_by if choice is False else [*ps, 1.0]
    elif "dare" in method:
        densities, asked, normalize = DENSITIES, {"rescale": choice}, False
        # Each model is dropped by a mask of its own.
        keeps = [reference.keep(437, p, 11, i, NAME, 1).reshape(19, 23) for i, p in enumerate(densities[:2])] + [True]
        divide_by = divide_by if choice is False else densities
    elif method == "linear":
        want = summed(rest, WEIGHTS, False, normalize)
        assert_merged(merge(None, thetas, WEIGHTS, method=method, name=NAME, **asked), want, dtype)
        return
    elect = "ties" in method or method == "della"
    want = expected(first, rest, WEIGHTS, keeps, elect=elect, normalize=normalize, divide_by=divide_by, scale=scale)
    asked |= {"densities": densities, "scale": scale, "seed": 11}
    assert_merged(merge(base, thetas, WEIGHTS, method=method, name=NAME, **asked), want, dtype)


# --- by hand


def test_ties_by_hand():
    # Trimmed to two of four: (3, -2, 0, 0), (-1, 0, 4, 0), (2, 0, -4, 0). The sums are 4, -2 and 0, where + wins.
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    deltas = torch.tensor([[3.0, -2.0, 1.0, 0.5], [-1.0, 0.5, 4.0, 0.25], [2.0, 1.0, -4.0, 1.0]])
    got = merge(base, list(base + deltas), [1.0, 1.0, 1.0], method="ties", name="a", densities=[0.5] * 3)
    assert got.tolist() == [1.0 + (3.0 + 2.0) / 2, 1.0 - 2.0, 1.0 + 4.0, 1.0]
    # A weight of 9 turns the first vote, 3 - 9 + 2, and the third, 36 - 4, has a winner.
    got = merge(base, list(base + deltas), [1.0, 9.0, 1.0], method="ties", name="a", densities=[0.5] * 3)
    assert got.tolist() == [1.0 - 9.0 / 9.0, -1.0, 1.0 + 36.0 / 9.0, 1.0]


def test_breadcrumbs_by_hand():
    # Of ten the largest two go, 10 and -9, and the smallest three, 1, -2 and 3.
    base = torch.zeros(10)
    delta = torch.tensor([1.0, -2.0, 3.0, 4.0, -5.0, 6.0, 7.0, -8.0, -9.0, 10.0])
    options = {"method": "breadcrumbs", "name": "a", "densities": [0.5]}
    got = merge(base, [delta], [2.0], margins=[0.2], **options)
    assert got.tolist() == [0.0, 0.0, 0.0, 8.0, -10.0, 12.0, 14.0, -16.0, 0.0, 0.0]
    # A gamma of 0.9 leaves what the density asks for: the smallest half.
    assert merge(base, [delta], [1.0], margins=[0.9], **options).tolist() == [1.0, -2.0, 3.0, 4.0, -5.0, *[0.0] * 5]
    # The default of gamma, 0.01, is none of ten elements.
    assert merge(base, [delta], [1.0], **options).tolist() == [*[0.0] * 5, 6.0, 7.0, -8.0, -9.0, 10.0]
    # What is equal to the smallest or the largest that stays, stays.
    x = torch.tensor([3.0, -2.0, 2.0, 1.0, -1.0, 0.0])
    assert trim(x, *trim_bounds(x, 0.4, 0.2)).tolist() == [0.0, -2.0, 2.0, 0.0, 0.0, 0.0]
    assert trim(x, *trim_bounds(x, 0.5, 0.4)).tolist() == [0.0, -2.0, 2.0, 1.0, -1.0, 0.0]
    other = torch.tensor([-1.0, 4.0, 0.0, 0.0, -5.0, 0.0, -9.0, 1.0, 0.0, 0.0])
    # The second keeps 4 and -5 of its -9, -5, 4, ...: they agree with nothing, with -10 and with nothing.
    options |= {"method": "breadcrumbs_ties", "densities": [0.5, 0.2]}
    got = merge(base, [delta, other], [2.0, 1.0], margins=[0.2, 0.1], **options)
    assert got.tolist() == [0.0, 4.0, 0.0, 8.0, -15.0, 12.0, 14.0, -16.0, 0.0, 0.0]


def test_della_by_hand():
    # Whatever is kept of the row 3, -1, 0, 2 was kept with these probabilities, and is divided by them.
    x = torch.tensor([[3.0, -1.0, 0.0, 2.0]] * 20_000)
    kept = drop_by_rank(x, 0.5, 0.375, mask_key("a", 0), rescale=True)
    p = torch.tensor([0.875, 0.375, 0.125, 0.625])
    assert torch.equal(kept, torch.where(kept == 0, 0.0, (x / p)))
    shares = (kept != 0).double().mean(0)[[0, 1, 3]]
    assert (shares - p[[0, 1, 3]]).abs().max() < 4 * 0.5 / math.sqrt(20_000)
    assert (kept.double().mean(0) - x[0]).abs().max() < 4 * 3 / math.sqrt(20_000)
    # A row of its own has the mean of the probabilities; equal magnitudes are ranked in their order.
    assert set(drop_by_rank(x[:, :1], 0.25, 0.1, mask_key("a", 0), rescale=True).unique().tolist()) == {0.0, 12.0}
    equal = drop_by_rank(torch.ones(20_000, 2), 0.5, 0.25, mask_key("a", 0), rescale=True)
    assert [column.unique().tolist() for column in equal.T] == [[0.0, 4.0], [0.0, torch.tensor(1 / 0.75).item()]]


def test_a_vote_by_hand():
    deltas = [torch.tensor([2.0, 2.0, 0.0, -1.0]), torch.tensor([-3.0, -2.0, 0.0, -1.0])]
    assert consensus(deltas, [1.0, 1.0], elect=True, normalize=False).tolist() == [-3.0, 2.0, 0.0, -2.0]
    # A negative weight turns its delta: 2 and 3, 2 and 2, 0 and 0, -1 and 1.
    assert consensus(deltas, [1.0, -1.0], elect=True, normalize=False).tolist() == [5.0, 4.0, 0.0, 1.0]
    # Where weights of opposite signs agree, their sum is 0 and divides nothing.
    assert consensus(deltas, [1.0, -1.0], elect=True, normalize=True).tolist() == [5.0, 4.0, 0.0, -1.0]


def test_the_mean_is_of_those_that_agree():
    deltas = [torch.tensor([4.0, 0.0]), torch.tensor([-1.0, 2.0]), torch.tensor([8.0, 6.0])]
    assert consensus(deltas, [1.0, 1.0, 3.0], elect=True, normalize=True).tolist() == [7.0, 5.0]
    assert consensus(deltas, [1.0, 1.0, 2.0], elect=False, normalize=True).tolist() == [4.75, 3.5]


def test_the_mean_over_masks_is_the_delta():
    base, theta = torch.zeros(20_000), torch.ones(20_000)
    got = merge(base, [theta], [1.0], method="dare_linear", name="a", densities=[0.25])
    assert set(got.tolist()) == {0.0, 4.0}
    # Four standard deviations of a mean of 20 000.
    assert abs(got.mean().item() - 1.0) < 4 * math.sqrt(3 / 20_000)


# --- what a method keeps


def test_ties_at_the_threshold_all_stay():
    x = torch.tensor([2.0, -2.0, 1.0, 2.0, -0.5])
    assert trim(x, *trim_bounds(x, 0.2)).tolist() == [2.0, -2.0, 0.0, 2.0, 0.0]
    assert trim(x, *trim_bounds(x, 1.0)).tolist() == x.tolist()
    assert trim(x, *trim_bounds(x, 0.001)).tolist() == [2.0, -2.0, 0.0, 2.0, 0.0]
    assert trim_bounds(torch.zeros(0), 0.5) == (0,)


@pytest.mark.parametrize("method", [name for name, entry in MERGE_METHODS.items() if entry.sparsify != "none"])
def test_a_density_of_one_keeps_everything(method):
    base, thetas = models((19, 23))
    whole = merge(base, thetas, WEIGHTS, method=method, name=NAME, densities=[1.0] * 3)
    assert torch.equal(whole, merge(base, thetas, WEIGHTS, method=method, name=NAME))
    plain = merge(base, thetas, WEIGHTS, method="task_arithmetic", name=NAME)
    assert torch.equal(whole, plain) == (method in ("dare_linear", "breadcrumbs", "della_linear"))


@pytest.mark.parametrize("method", [name for name in GIVEN if MERGE_METHODS[name].deltas])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_zero_leave_the_base(method, dtype):
    base, thetas = models((19, 23), dtype)
    assert torch.equal(merge(base, thetas, [0.0] * 3, method=method, name=NAME), base)
    one = merge(base, thetas, [0.0, 1.0, 0.0], method=method, name=NAME)
    assert torch.equal(one, merge(base, thetas[1:2], [1.0], method=method, name=NAME))


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_nan_stays_nan_and_nothing_else_becomes_it(method):
    entry = MERGE_METHODS[method]
    base, thetas = models((6, 7), count=len(TAKEN[method]))
    thetas[0][2, 3] = NAN
    # The vote for a sign that is not the NaN's must not drop it.
    for theta in thetas[1:]:
        theta[2, 3] = 9.0
    densities = None if entry.sparsify == "none" else [1.0] * 3
    got = merge(base if entry.has_base else None, thetas, TAKEN[method], method=method, name=NAME, densities=densities)
    assert got.isnan().nonzero().tolist() == [[2, 3]]


def test_a_trim_keeps_nan():
    base, thetas = models((6, 7), count=2)
    thetas[1][0, 0] = NAN
    for method in ("ties", "breadcrumbs"):
        got = merge(base, thetas, [1.0, 1.0], method=method, name=NAME, densities=[0.1, 0.1])
        assert got.isnan().nonzero().tolist() == [[0, 0]]


# --- blocks, shapes, dtypes


@given(
    method=st.sampled_from([*GIVEN, "nearswap"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    cuts=st.lists(st.integers(0, 437), max_size=5),
    normalize=st.sampled_from([None, True, False]),
    scale=st.sampled_from([1.0, 0.3]),
)
def test_blocks_have_the_bits_of_the_whole(method, dtype, cuts, normalize, scale):
    weights, given = TAKEN[method], method in GIVEN
    base, thetas = models((19, 23), dtype, count=len(weights))
    normalize, scale = normalize if given else None, scale if given and MERGE_METHODS[method].deltas else 1.0
    decided = merge_method(method, normalize=normalize, scale=scale)
    densities = None if decided.sparsify == "none" else DENSITIES
    margins = [0.1] * 3 if decided.sparsify in MARGINS else None
    start = base if decided.has_base else None
    options = {"normalize": normalize, "scale": scale, "seed": 7, "densities": densities, "margins": margins}
    whole = merge(start, thetas, weights, method=method, name=NAME, **options)
    wide = dtype if dtype == torch.float64 else torch.float32
    bounds = None
    if decided.has_thresholds:
        deltas = [theta.to(wide) - base.to(wide) for theta in thetas]
        bounds = [trim_bounds(x, p, margins and 0.1) for x, p in zip(deltas, DENSITIES, strict=True)]
    own, blocks = Coefficients(weights, densities, margins, bounds), []
    if decided.sparsify == "ranked":
        cuts = [cut // 23 * 23 for cut in cuts]
    for i, j in pairwise([0, *sorted(cuts), 437]):
        first, *each = (None if x is None else x.flatten()[i:j] for x in (start, *thetas))
        key = mask_key(NAME, 7)._replace(shard=ShardIndex(i, max(j - i, 1), max(j - i, 1)))
        blocks.append(merge_block(first, each, decided, own, row=23, key=key, dtype=dtype))
    assert same_bits(torch.cat(blocks), whole.flatten())


@pytest.mark.parametrize("method", MERGE_METHODS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7, 3)])
@ALL_DTYPES
def test_shapes(method, shape, dtype):
    entry = MERGE_METHODS[method]
    base, thetas = models(shape, dtype, count=len(TAKEN[method]))
    before = [tensor.clone() for tensor in (base, *thetas)]
    densities = None if entry.sparsify == "none" else [0.5] * 3
    got = merge(base if entry.has_base else None, thetas, TAKEN[method], method=method, name=NAME, densities=densities)
    assert (got.shape, got.dtype, got.isnan().any()) == (shape, dtype, False)
    assert all(same_bits(a, b) for a, b in zip(before, (base, *thetas), strict=True))


def test_models_of_several_dtypes_and_a_dtype_of_the_result():
    base, thetas = models((19, 23))
    mixed = [thetas[0].bfloat16(), thetas[1].half(), thetas[2]]
    got = merge(base.bfloat16(), mixed, WEIGHTS, method="task_arithmetic", name=NAME)
    assert got.dtype == torch.bfloat16
    wide = merge(base.bfloat16(), mixed, WEIGHTS, method="task_arithmetic", name=NAME, dtype=torch.float32)
    want = merge(base.bfloat16().float(), [x.float() for x in mixed], WEIGHTS, method="task_arithmetic", name=NAME)
    assert same_bits(wide, want)
    assert same_bits(got, want.bfloat16())
    double = merge(base, [thetas[0].double()], [0.1], method="task_arithmetic", name=NAME, dtype=torch.float64)
    assert torch.equal(double, base.double() + 0.1 * (thetas[0].double() - base.double()))


def test_views_of_any_strides():
    base, thetas = models((19, 23))
    densities = [0.3, 0.5, 0.9]
    across = merge(base.T, [x.T for x in thetas], WEIGHTS, method="ties", name=NAME, densities=densities)
    assert torch.equal(across.T, merge(base, thetas, WEIGHTS, method="ties", name=NAME, densities=densities))
    rows = [x.T.contiguous() for x in (base, *thetas)]
    ranked = {"method": "della", "name": NAME, "densities": densities, "margins": [0.1] * 3}
    assert torch.equal(
        merge(base.T, [x.T for x in thetas], WEIGHTS, **ranked), merge(rows[0], rows[1:], WEIGHTS, **ranked)
    )
    other = thetas[0].T.contiguous()
    turned = [merge(start, [other], [0.2], method="slerp", name=NAME) for start in (base.T, base.T.contiguous())]
    assert torch.equal(*turned)


@given(
    st.lists(st.tuples(*[st.floats(-8, 8, width=16)] * 3), min_size=1, max_size=20),
    st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, -1.0, 2.0])] * 3),
    st.booleans(),
    st.booleans(),
)
def test_any_consensus_is_that_of_its_elements(elements, weights, elect, normalize):
    deltas = [torch.tensor(own, dtype=torch.float32) for own in zip(*elements, strict=True)]
    got = consensus(deltas, weights, elect=elect, normalize=normalize)
    assert np.array_equal(got.numpy(), summed([delta.numpy() for delta in deltas], weights, elect, normalize))


# --- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, "method 'ties' starts from a base; pass one"),
        ({"base": None, "method": "slerp"}, "method 'slerp' starts from a base"),
        ({"method": "linear"}, "method 'linear' has no base; pass None"),
        ({"thetas": [torch.ones(1)]}, r"'a' is \[3\] and \[1\]; all models need one shape"),
        ({"thetas": [torch.ones(3)] * 2}, "2 models need as many weights, got 1"),
        ({"rescale": True}, "'ties' has no option 'rescale'"),
    ],
)
def test_what_does_not_fit(change, message):
    arguments = {"base": torch.ones(3), "thetas": [torch.ones(3)], "weights": [1.0], "method": "ties", "name": "a"}
    with pytest.raises(ValueError, match=message):
        merge(**arguments | change)


def test_a_block_cannot_find_its_own_bounds():
    ones, own = torch.ones(3), Coefficients((1.0,), (0.5,))
    with pytest.raises(AssertionError, match="'ties' merges blocks with bounds of the whole tensor"):
        merge_block(ones, [ones], MERGE_METHODS["ties"], own, row=3, key=mask_key("a", 0), dtype=ones.dtype)
