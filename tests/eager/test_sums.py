"""The one defined sum: by hand, against a recursive definition, and its aligned blocks as its nodes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from device import DEVICE
from one_tensor import draw

from fused_merge import functional
from fused_merge.eager.sums import inner_product, tree_sum


def tree(x):
    """Sum the halves of the elements, padded to a power of two, and add the two."""
    if x.size == 1:
        return x[0]
    half = 1 << ((x.size - 1).bit_length() - 1)
    left, right = x[:half], np.concatenate([x[half:], np.zeros(2 * half - x.size, x.dtype)])
    return tree(left) + tree(right)


def test_five_elements_by_hand():
    # From left to right each 1 is lost in 2^24. The tree adds 2^24 + 1 = 2^24, 1 + 1 = 2 and 1 + 0 = 1, then
    # 2^24 + 2, then 2^24 + 3, which is halfway and goes to the even 2^24 + 4.
    values = [2.0**24, 1.0, 1.0, 1.0, 1.0]
    assert tree_sum(torch.tensor(values)).item() == 2.0**24 + 4
    # In another order other ones are lost: (1 + 1) + (1 + 1) = 4 and 2^24 + 0.
    assert tree_sum(torch.tensor(values[1:] + values[:1])).item() == 2.0**24 + 4
    # 1 + 2^24 = 2^24, -2^24 + 1 = -(2^24 - 1), together 1, and one more; from left to right it would be 2.
    assert tree_sum(torch.tensor([1.0, 2.0**24, -(2.0**24), 1.0, 1.0])).item() == 2.0
    # 2^24 + 1 = 2^24 and 1 - 2^24 = -(2^24 - 1): 1, where the exact sum is 2.
    assert tree_sum(torch.tensor([2.0**24, 1.0, 1.0, -(2.0**24)])).item() == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_element_and_one(dtype):
    assert torch.equal(tree_sum(torch.zeros(0, dtype=dtype)), torch.zeros((), dtype=dtype))
    assert torch.equal(tree_sum(torch.zeros(3, 0, dtype=dtype)), torch.zeros(3, dtype=dtype))
    assert torch.equal(tree_sum(torch.tensor([7.5], dtype=dtype)), torch.tensor(7.5, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 33, 100, 1023, 1024, 1025, 40_000])
def test_it_is_the_recursive_definition_bit_for_bit(n, dtype):
    x = draw(n, dtype=dtype)
    assert tree_sum(x).numpy() == tree(x.numpy())


def test_it_is_not_the_sum_of_torch():
    x = draw(40_000)
    assert tree_sum(x) != x.sum()
    assert abs(tree_sum(x).double() - x.double().sum()) < 1e-6 * x.abs().sum()


@pytest.mark.parametrize("n", [64, 65, 1000, 1025, 4095])
@pytest.mark.parametrize("block", [1, 2, 16, 64, 512])
def test_the_sum_of_an_aligned_block_is_a_node(n, block):
    x = draw(n)
    partial = torch.stack([tree_sum(x[start : start + block]) for start in range(0, n, block)])
    assert torch.equal(tree_sum(partial), tree_sum(x))


@pytest.mark.parametrize("zeros", [1, 3, 24, 1000])
def test_zeros_at_the_end_change_nothing(zeros):
    x = draw(1000)
    assert torch.equal(tree_sum(torch.cat([x, torch.zeros(zeros)])), tree_sum(x))


def test_each_row_of_many_is_summed_alone():
    x = draw((4, 5, 37))
    assert torch.equal(tree_sum(x), torch.stack([torch.stack([tree_sum(row) for row in plane]) for plane in x]))


INNER_SHAPES = [(), (1,), (37,), (0,), (3, 11), (4, 3, 5), (2, 3, 4, 5), (5, 1), (4, 0), (0, 4), (0, 4, 3)]


@pytest.mark.parametrize("shape", INNER_SHAPES)
def test_the_inner_product_over_the_tensor_and_over_rows(shape):
    x, y = draw(shape), draw(shape, seed=1)
    whole, product = inner_product(x, y), inner_product(x, y, rows=True)
    assert whole.shape == ()
    assert whole.numpy() == (tree((x * y).numpy().reshape(-1)) if x.numel() else np.float32(0))
    assert (product * x).shape == x.shape
    if x.ndim < 2:
        assert torch.equal(product, whole)
    else:
        assert product.shape == (shape[0], *[1] * (x.ndim - 1))
        assert product.flatten().tolist() == [inner_product(a, b).item() for a, b in zip(x, y, strict=True)]


@pytest.mark.parametrize("rows", [False, True])
def test_the_order_is_that_of_the_elements_and_not_of_the_memory(rows):
    x, y = draw((30, 50)), draw((30, 50), seed=1)
    strided = inner_product(x.t().contiguous().t(), y.t().contiguous().t(), rows=rows)
    assert torch.equal(strided, inner_product(x, y, rows=rows))


def test_nan_and_infinity_are_summed_as_numbers_are():
    assert tree_sum(torch.tensor([1.0, torch.nan, 2.0])).isnan()
    assert tree_sum(torch.tensor([1.0, torch.inf, 2.0])).item() == torch.inf
    assert tree_sum(torch.tensor([torch.inf, 1.0, -torch.inf])).isnan()


SHAPES = [(1,), (0,), (), (127,), (32, 33), (3, 7, 61), (40_000,)]
TRIPLES = {
    "<x, x>": (torch.float32, None, None),
    "<x, y>": (torch.float32, torch.bfloat16, None),
    "<x, y - z>": (torch.bfloat16, torch.float16, torch.float16),
    "<x, y - z>, fp32": (torch.float32, torch.float32, torch.float32),
}


def triples(dtypes):
    return [
        None if dtype is None else [draw(shape, seed=seed).to(DEVICE, dtype) for shape in SHAPES]
        for seed, dtype in enumerate(dtypes)
    ]


@pytest.mark.parametrize("scale", [1.0, 0.3, torch.tensor(0.3, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("dtypes", TRIPLES.values(), ids=TRIPLES)
def test_the_kernel_equals_eager(dtypes, scale):
    x, y, z = triples(dtypes)
    by_kernel, by_eager = (functional.inner_products(x, y, z, scale=scale, impl=impl) for impl in ("triton", "eager"))
    assert all(product.shape == () and product.dtype == torch.float32 for product in by_kernel)
    assert_same_bits(by_kernel, by_eager)


@pytest.mark.parametrize("impl", ["eager", "triton"])
def test_products_of_groups_by_hand(impl):
    x, y, z = (torch.tensor(values, device=DEVICE) for values in ([1.0, 2.0], [3.0, 4.0], [1.0, 1.0]))
    for others, scale, expected in [
        ((None, None), 1.0, 5.0),
        ((None, None), 2.0, 20.0),
        ((y, None), 1.0, 11.0),
        ((y, z), 2.0, 16.0),
    ]:
        lists = [None if other is None else [other, other[:1]] for other in others]
        whole, first = functional.inner_products([x, x[:1]], *lists, scale=scale, impl=impl)
        assert whole == expected
        assert first == scale * x[0] * (
            (scale * x[0] if lists[0] is None else y[0]) - (0 if lists[1] is None else z[0])
        )


def test_strides_alignment_and_company_do_not_show():
    x, y = (draw((33, 48), seed=seed).to(DEVICE) for seed in range(2))
    (alone,) = functional.inner_products([x], [y], impl="eager")
    shifted = torch.zeros(33 * 48 + 1, device=DEVICE)[1:].view(33, 48).copy_(x)
    strided = x.t().contiguous().t()
    for left in (x, shifted, strided):
        for product in functional.inner_products([y, left, y], [y, y, x], impl="triton")[1:]:
            assert product == alone


def test_a_workspace_notices_other_tensors():
    workspace = functional.Workspace()
    for seed in range(3):
        x = draw(500 + seed, seed=seed).to(DEVICE)
        (product,) = functional.inner_products([x], workspace=workspace, impl="triton")
        assert product == inner_product(x, x)


@pytest.mark.parametrize("counts", [[1], [1, 1025, 3], [1024, 2500, 1]], ids=str)
def test_block_sums_are_added_up_however_many_there_are(counts):
    from fused_merge.kernels.sums import Reduction

    sums = torch.stack([draw(sum(counts)), draw(sum(counts), seed=1)], 1).to(DEVICE)
    found = Reduction(counts, DEVICE)(sums)
    assert torch.equal(found, torch.stack([tree_sum(part.t()) for part in sums.split(counts)]))


def test_what_has_no_inner_product_is_named():
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(ValueError, match=r"tensor 1: \(3,\) torch.float32 on .* and \(2,\) .* have no inner product"):
        functional.inner_products([x, x], [x, x[:2]])
    with pytest.raises(ValueError, match="have no inner product"):
        functional.inner_products([x], [x.int()])
    with pytest.raises(ValueError, match=r"equally many tensors, got \[1, 2\]"):
        functional.inner_products([x], [x, x])
    with pytest.raises(ValueError, match="minus is subtracted from ys"):
        functional.inner_products([x], minus=[x])
    with pytest.raises(RuntimeError, match=r"cannot serve tensor 0: torch\.float64 tensors have no kernel"):
        functional.inner_products([x.double()], impl="triton")
    assert functional.inner_products([x.double()], [x])[0].dtype == torch.float64
