"""The exact k-th largest of integers that several places hold, found by counting.

An interval is known to hold it: at first that of all patterns. Each round counts the elements in 256 equal bins of the
interval, and the bin that holds rank k becomes the next interval, until it is one pattern wide. Counts of the parts of
a tensor add up to those of the whole, so that it does not matter who holds which elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 256
# Elements counted at once, to keep temporaries in the cache.
_CHUNK = 1 << 18


def shifts(dtype: torch.dtype) -> range:
    """Return, round by round, the power of two patterns in a bin: four rounds for int32, eight for int64.

    The first interval begins at 0, and patterns are not negative.
    """
    return range(8 * (dtype.itemsize - 1), -1, -8)


def bin_counts(patterns: Tensor, low: Tensor, shift: int) -> Tensor:
    """Return how many patterns lie in each of 256 bins of 2^shift patterns, the first of which begins at `low`.

    Args:
        patterns: int32 or int64, not negative, any shape.
        low: 0-d int64, on the same device.
        shift: one of `shifts`.

    Returns:
        int64 `[256]`.
    """
    # What lies in none of the bins is counted before the first and behind the last.
    counts = torch.zeros(BINS + 2, dtype=torch.int64, device=patterns.device)
    one = torch.ones(1, dtype=torch.int64, device=patterns.device)
    for chunk in torch.split(patterns.reshape(-1), _CHUNK):
        bins = ((chunk.long() - low) >> shift).clamp_(-1, BINS).add_(1)
        counts.index_add_(0, bins, one.expand(len(bins)))
    return counts[1:-1].clone()


def narrow(counts: Tensor, low: Tensor, rank: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Return where the bin that holds rank k begins, and the rank within it; after the last round that is the result.

    Args:
        counts: int64 `[..., 256]`, added up over all that hold elements; for one tensor or for several at once.
        low: int64 `[...]`, where the interval begins.
        rank: int64 `[...]`, of what is sought in it; 1 is its largest.
        shift: as it was counted with.
    """
    above = counts.flip(-1).cumsum(-1).flip(-1) - counts
    chosen = ((above < rank.unsqueeze(-1)) & (above + counts >= rank.unsqueeze(-1))).long()
    bins = chosen.argmax(-1)
    return low + (bins << shift), rank - (above * chosen).sum(-1)
