"""The k-th largest magnitude of a logical tensor of which each process holds a shard, by rounds of counting.

Each round counts the local elements in 256 equal bins of an interval of bit patterns; the counts, added up over the
processes, say which bin holds rank k, and that bin is the next interval, until it is one pattern wide.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 256


def bin_shifts(dtype: torch.dtype) -> range:
    """Return for each round the power of two patterns in a bin, for patterns of int32 or int64."""
    return range(8 * dtype.itemsize - 8, -1, -8)


def bin_counts(pattern: Tensor, low: Tensor, shift: int) -> Tensor:
    """Return how many patterns lie in each of 256 bins of 2^shift patterns from `low` on, int64 `[256]`."""
    bins = (pattern - low) >> shift
    bins = torch.where((pattern >= low) & (bins < _BINS), bins, _BINS)
    return torch.bincount(bins.flatten(), minlength=_BINS + 1)[:_BINS]


def narrow(counts: Tensor, low: Tensor, rank: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Return where the bin that holds a rank begins, and the rank in it, from 1 for its largest; 0-d."""
    above = counts.flip(0).cumsum(0).flip(0) - counts
    chosen = ((above < rank) & (above + counts >= rank)).int().argmax()
    return low + (chosen << shift).to(low.dtype), rank - above[chosen]
