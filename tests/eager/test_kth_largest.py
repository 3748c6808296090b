"""The k-th largest by counting, of whole tensors and of parts, against sorting."""

from __future__ import annotations

import pytest
import torch

from fused_merge.eager.kth_largest import BINS, bin_counts, narrow, shifts
from fused_merge.eager.sparsify import pattern

KINDS = {
    "normal": lambda n: torch.randn(n),
    "few values": lambda n: torch.randint(-3, 4, (n,)).float() * 1e-3,
    "all equal": lambda n: torch.full((n,), -2.5),
    "zeros": lambda n: torch.zeros(n),
    "extreme": lambda n: torch.tensor([0.0, -0.0, 1e-45, -3e38, torch.inf, torch.nan]).repeat(n // 6 + 1)[:n],
}


def search(parts, k):
    """What processes do that hold the parts."""
    low, rank = torch.tensor(0), torch.tensor(k)
    for shift in shifts(parts[0].dtype):
        counts = sum(bin_counts(part, low, shift) for part in parts)
        low, rank = narrow(counts, low, rank, shift)
    return low


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 255, 2**18 + 77])
def test_the_kth_largest_of_parts_is_that_of_the_whole(kind, dtype, n):
    torch.manual_seed(n)
    x = pattern(KINDS[kind](n).to(dtype))
    ordered = x.sort(descending=True).values
    for k in {1, 2, n // 10, n - 1, n} - {0}:
        if k <= n:
            for parts in ([x], [x[: n // 3], x[:0], x[n // 3 :]], [x.view(1, n), x[:0]]):
                found = search(parts, k)
                assert found.dtype == torch.int64
                assert found == ordered[k - 1]


@pytest.mark.parametrize(("dtype", "rounds"), [(torch.int32, 4), (torch.int64, 8)])
def test_rounds_reach_single_patterns(dtype, rounds):
    assert len(shifts(dtype)) == rounds
    assert shifts(dtype)[-1] == 0
    assert BINS << shifts(dtype)[0] >= 2 ** (8 * dtype.itemsize - 1)


def test_counts_by_hand():
    patterns = torch.tensor([5, 255, 256, 511, 512, 70_000], dtype=torch.int32)
    counts = bin_counts(patterns, torch.tensor(256), 0)
    assert (counts[0], counts[255], counts.sum()) == (1, 1, 2)
    assert bin_counts(patterns, torch.tensor(0), 8)[:4].tolist() == [2, 2, 1, 0]
    low, rank = narrow(bin_counts(patterns, torch.tensor(0), 8), torch.tensor(0), torch.tensor(2), 8)
    # 70 000 lies in bin 273, outside: of the five others the second largest is 511, the largest in its bin.
    assert (low, rank) == (256, 1)


def test_several_tensors_at_once():
    torch.manual_seed(0)
    tensors = [pattern(torch.randn(n)) for n in (3, 1000, 77)]
    low, rank = torch.zeros(3, dtype=torch.int64), torch.tensor([2, 100, 77])
    for shift in shifts(torch.int32):
        counts = torch.stack([bin_counts(x, own, shift) for x, own in zip(tensors, low, strict=True)])
        low, rank = narrow(counts, low, rank, shift)
    assert low.tolist() == [search([x], k) for x, k in zip(tensors, (2, 100, 77), strict=True)]
