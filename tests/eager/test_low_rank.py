"""The product of an adapter's factors: by hand, in any blocks of rows, and in fp64."""

from __future__ import annotations

import torch
from bits import assert_same_bits

from fused_merge.eager.low_rank import low_rank_delta


def test_by_hand():
    left, right = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[4.0, 0.0, 1.0], [0.5, 2.0, -1.0]])
    expected = torch.tensor([[10.0, 8.0, -2.0], [23.0, -4.0, 8.0]])
    assert_same_bits(low_rank_delta(left, right, 2.0), expected)


def test_terms_are_added_in_order_and_each_rounded():
    left, right = torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[2.0**24], [1.0], [1.0]])
    assert low_rank_delta(left, right, 1.0).item() == 2.0**24
    assert low_rank_delta(left.flip(1), right.flip(0), 1.0).item() == 2.0**24 + 2


def test_rows_have_the_bits_of_the_whole():
    torch.manual_seed(0)
    left, right = torch.randn(50, 7), torch.randn(7, 33)
    before = left.clone(), right.clone()
    whole = low_rank_delta(left, right, 0.3)
    parts = torch.cat([low_rank_delta(left[start : start + 11], right, 0.3) for start in range(0, 50, 11)])
    assert_same_bits(parts, whole)
    assert_same_bits(before, (left, right))
    exact = 0.3 * (left.double() @ right.double())
    torch.testing.assert_close(low_rank_delta(left.double(), right.double(), 0.3), exact, rtol=0, atol=1e-14)
    torch.testing.assert_close(whole.double(), exact, rtol=0, atol=1e-5)
