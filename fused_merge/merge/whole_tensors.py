"""What whole tensors and whole models decide, found in blocks: the k-th largest magnitude, and inner products.

The k-th largest is exact: its pattern is found digit by digit, 16 bits a read, from histograms. Sums are the one tree
of `fused_merge.eager.sums`, whose nodes the blocks are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.sparsify import pattern
from fused_merge.eager.sums import tree_sum
from fused_merge.io.files import bytes_of, read_into, reading
from fused_merge.io.sources import FileRange

# Elements of a block: a node of every tree, and small enough for its temporaries to stay in a cache.
_BLOCK = 1 << 18
_DIGIT = 16

Advance = Callable[[int], None]
# `map`, or that of threads.
Map = Callable[..., Iterable[Any]]


class Pair(NamedTuple):
    """The same elements in two files: of a base and of a model."""

    base: FileRange
    model: FileRange
    numel: int
    wide: torch.dtype  # that they are merged in, which other models of the merge decide too

    @property
    def nbytes(self) -> int:
        """Bytes that one read of both takes."""
        return self.numel * (self.base.dtype.itemsize + self.model.dtype.itemsize)

    def blocks(self, advance: Advance) -> Iterator[tuple[Tensor, Tensor]]:
        """Read both, block by block, widened."""
        with reading(self.base.file) as first, reading(self.model.file) as second:
            for start in range(0, self.numel, _BLOCK):
                widened = []
                for handle, place in ((first, self.base), (second, self.model)):
                    tensor = torch.empty(min(_BLOCK, self.numel - start), dtype=place.dtype)
                    read_into(handle, place.file, bytes_of(tensor), place.offset + start * place.dtype.itemsize)
                    advance(tensor.nbytes)
                    widened.append(tensor.to(self.wide))
                yield widened[0], widened[1]


def lowest_bits(wide: torch.dtype) -> list[int]:
    """Return the lowest bit of each digit of a magnitude's pattern, highest digit first; each takes one read."""
    # The sign has no digit.
    return [max(0, low) for low in range(wide.itemsize * 8 - 1 - _DIGIT, -_DIGIT, -_DIGIT)]


def kth_magnitude(pairs: Sequence[Pair], k: int, advance: Advance, each: Map = map) -> int:
    """Return the integer pattern of the k-th largest |model - base| of all pairs together, 1 being the largest.

    The pairs are of one `wide` dtype. `advance` is called with the bytes just read; `each` maps a function over pairs.
    """
    (wide,) = {pair.wide for pair in pairs}
    found, above = 0, wide.itemsize * 8 - 1
    for low in lowest_bits(wide):
        histogram = _Histogram(found, above, low)
        for _ in each(lambda pair, histogram=histogram: histogram.add(pair, advance), pairs):
            pass
        digit, k = histogram.of_kth(k)
        found, above = found << (above - low) | digit, low
    return found


class _Histogram:
    """How often each value of one digit of a magnitude's pattern is found with given digits above it."""

    def __init__(self, found: int, above: int, low: int) -> None:
        # The digits above, the lowest bit of those, and the lowest bit of this one.
        self._found, self._above, self._low = found, above, low
        self._counts = torch.zeros(1 << (above - low), dtype=torch.int64)
        self._lock = threading.Lock()

    def add(self, pair: Pair, advance: Advance) -> None:
        """Count the elements of a pair, from any thread."""
        for base, model in pair.blocks(advance):
            magnitudes = pattern(model - base)
            digits = magnitudes[magnitudes >> self._above == self._found] >> self._low & (len(self._counts) - 1)
            counts = torch.bincount(digits, minlength=len(self._counts))
            with self._lock:
                self._counts += counts

    def of_kth(self, k: int) -> tuple[int, int]:
        """Return the digit of the k-th largest, and its rank among those that share it."""
        from_top = self._counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, k))
        larger = int(from_top[place - 1]) if place else 0
        return len(self._counts) - 1 - place, k - larger


def inner_products(pair: Pair, advance: Advance) -> tuple[float, float, float]:
    """Return <a, a>, <b, b> and <a, b> of base a and model b: the sums of `fused_merge.eager.sums`."""
    nodes = [torch.stack([tree_sum(x * y) for x, y in ((a, a), (b, b), (a, b))]) for a, b in pair.blocks(advance)]
    first, second, both = tree_sum(torch.stack(nodes, dim=1)).tolist() if nodes else (0.0, 0.0, 0.0)
    return first, second, both
