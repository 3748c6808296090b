"""Compiled inner products and sums against the eager ones, bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from bits import assert_same_bits, same_bits
from numba import njit
from one_tensor import draw

from fused_merge import functional
from fused_merge.compiled import sums
from fused_merge.compiled.memory import BLOCK
from fused_merge.compiled.scratch import ROOM
from fused_merge.eager.sums import inner_product, tree_sum

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 5, 16, 17, 255, 256, 257, BLOCK - 1, BLOCK, BLOCK + 1, 33_000, 100_001]


@njit
def sum_of(source, other, count):
    return sums.tree_sum(source, other, count)


@njit
def product_of(left, right, factor, room, other, count):
    return sums.inner_product(left, right, factor, room, other, count)


def poisoned() -> torch.Tensor:
    return torch.full((ROOM,), torch.nan)


@pytest.mark.parametrize("scale", [1.0, -0.0])
def test_sums_are_the_tree(scale):
    for count in [*range(300), 511, 512, 513, 767, 1023, 1025, BLOCK - 1, BLOCK, BLOCK + 1, ROOM - 1, ROOM]:
        x, source, other = scale * draw(count).abs(), poisoned(), poisoned()
        source[:count] = x
        found = torch.tensor(sum_of(source.data_ptr(), other.data_ptr(), count), dtype=torch.float32)
        assert same_bits(found, tree_sum(x)), count


def test_products_of_blocks_are_nodes_of_the_tree():
    for count in [*range(300), 511, 512, 513, 767, 1023, 1025, BLOCK - 1, BLOCK]:
        x, y, room, other = draw(count), draw(count, seed=1), poisoned(), poisoned()
        factor = torch.tensor(0.3)
        told = x.data_ptr(), y.data_ptr(), factor.numpy()[()], room.data_ptr(), other.data_ptr(), count
        assert same_bits(torch.tensor(product_of(*told), dtype=torch.float32), inner_product(factor * x, y)), count


@pytest.mark.parametrize("scale", [1.0, 0.37, torch.tensor(1 / 3, dtype=torch.float64)])
@pytest.mark.parametrize("operands", [1, 2, 3])
def test_products_of_many_tensors_equal_eager_ones(operands, scale):
    dtypes = list(product(DTYPES, repeat=3))
    columns = [
        [draw(n, seed=10 * i + k).to(own[k]) for i, (n, own) in enumerate(product(SIZES, dtypes))]
        for k in range(operands)
    ]
    for k, column in enumerate(columns):
        # Whatever the strides, the elements are in row-major order.
        column.append(draw((40, 50), seed=k).t() if k % 2 else draw((50, 40), seed=k))
        column.append(torch.tensor([torch.inf, 1.0, -0.0]) if k else torch.tensor([0.0, 1.0, 1.0]))
    made, expected = (functional.inner_products(*columns, scale=scale, impl=impl) for impl in ("compiled", "eager"))
    # inf * 0 is a NaN, and a NaN is a NaN.
    assert made[-1].isnan() == expected[-1].isnan()
    assert_same_bits(made[:-1], expected[:-1])


def test_more_blocks_than_a_block_has_elements():
    x = draw(BLOCK * BLOCK + 3 * BLOCK + 5)
    (made,), (expected,) = (functional.inner_products([x], impl=impl) for impl in ("compiled", "eager"))
    assert same_bits(made, expected)
    assert functional.inner_products([], impl="compiled") == []


def test_fp64_goes_to_the_eager_code_or_is_refused(monkeypatch):
    xs, ys = [draw(50), draw(50, seed=1)], [draw(50), draw(50, dtype=torch.float64)]
    sentence = "impl='compiled' cannot serve tensor 1: there is no compiled code for torch.float64 tensors"
    with pytest.raises(RuntimeError, match=sentence):
        functional.inner_products(xs, ys, impl="compiled")
    monkeypatch.setattr("fused_merge.functional.backend.COMPILE_FROM", 10)
    assert_same_bits(*(functional.inner_products(xs, ys, impl=impl) for impl in ("auto", "eager")))
