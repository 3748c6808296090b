"""What whole tensors and whole models decide, found in blocks: the k-th largest magnitude, and inner products.

The k-th largest is exact: its pattern is found digit by digit, 16 bits a read, from histograms. Sums are the one tree
of `fused_merge.eager.sums`, whose nodes the blocks are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_merge.eager.sparsify import pattern
from fused_merge.eager.sums import tree_sum
from fused_merge.io.files import reading
from fused_merge.io.sources import FileRange, read_range

# Elements of a block: a node of every tree, and small enough for its temporaries to stay in a cache.
_BLOCK = 1 << 18
_DIGIT = 16

Advance = Callable[[int], None]
# `map`, or that of threads.
Map = Callable[..., Iterable[Any]]


class Inputs(NamedTuple):
    """The same elements in several files: of the base, if there is one, and of the models."""

    places: tuple[FileRange, ...]
    numel: int
    wide: torch.dtype  # that they are merged in, which other models of the merge decide too

    @property
    def nbytes(self) -> int:
        """Bytes that one read of all takes."""
        return self.numel * sum(place.dtype.itemsize for place in self.places)

    def blocks(self, advance: Advance) -> Iterator[list[Tensor]]:
        """Read all, block by block, widened."""
        # Of many files less of each, so that together they stay in a cache: half as much is a node of the tree, too.
        size = _BLOCK >> max(0, (len(self.places) - 1).bit_length() - 1)
        with ExitStack() as stack:
            opened = [(stack.enter_context(reading(place.file)), place) for place in self.places]
            for start in range(0, self.numel, size):
                widened = []
                for handle, place in opened:
                    tensor = read_range(handle, place, start, min(size, self.numel - start))
                    advance(tensor.nbytes)
                    widened.append(tensor.to(self.wide))
                yield widened


def lowest_bits(wide: torch.dtype) -> list[int]:
    """Return the lowest bit of each digit of a magnitude's pattern, highest digit first; each takes one read."""
    # The sign has no digit.
    return [max(0, low) for low in range(wide.itemsize * 8 - 1 - _DIGIT, -_DIGIT, -_DIGIT)]


def kth_magnitudes(pairs: Sequence[Inputs], ranks: Sequence[int], advance: Advance, each: Map = map) -> tuple[int, ...]:
    """Return the integer pattern of the k-th largest |model - base| of all pairs together, 1 being the largest.

    There is one for each k of `ranks`. The inputs are of a base and a model, all of one `wide` dtype. `advance` is
    called with the bytes just read; `each` maps a function over pairs.
    """
    (wide,) = {pair.wide for pair in pairs}
    searches = [_Search(k, wide.itemsize * 8 - 1) for k in ranks]
    for low in lowest_bits(wide):

        def count(pair: Inputs, low: int = low) -> None:
            for base, model in pair.blocks(advance):
                magnitudes = pattern(model - base)
                for search in searches:
                    search.count(magnitudes, low)

        for _ in each(count, pairs):
            pass
        for search in searches:
            search.narrow(low)
    return tuple(search.found for search in searches)


class _Search:
    """The k-th largest pattern, as far as it is found: digits from the top, each from a histogram of the next."""

    def __init__(self, k: int, above: int) -> None:
        # The rank among those that share the digits found, and the lowest bit of these.
        self._k, self._above = k, above
        self._counts, self.found = torch.zeros(0, dtype=torch.int64), 0
        self._lock = threading.Lock()

    def count(self, magnitudes: Tensor, low: int) -> None:
        """Count the values of the digit down to a bit, from any thread."""
        digits = magnitudes[magnitudes >> self._above == self.found] >> low & ((1 << (self._above - low)) - 1)
        counts = torch.bincount(digits, minlength=1 << (self._above - low))
        with self._lock:
            self._counts = self._counts + counts if len(self._counts) else counts

    def narrow(self, low: int) -> None:
        """Add the digit of the k-th largest to what is found."""
        from_top = self._counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, self._k))
        self._k -= int(from_top[place - 1]) if place else 0
        self.found = self.found << (self._above - low) | (len(self._counts) - 1 - place)
        self._above, self._counts = low, self._counts[:0]


def inner_products(inputs: Inputs, advance: Advance, *, deltas: bool) -> list[list[float]]:
    """Return <x, y> for all x and y of the inputs: the sums of `fused_merge.eager.sums`.

    With `deltas` they are of the differences from the first of them.
    """
    count = len(inputs.places) - deltas
    pairs = [(i, j) for i in range(count) for j in range(i, count)]
    nodes = []
    for block in inputs.blocks(advance):
        ends = [x - block[0] for x in block[1:]] if deltas else block
        nodes.append(torch.stack([tree_sum(ends[i] * ends[j]) for i, j in pairs]))
    sums = tree_sum(torch.stack(nodes, dim=1)).tolist() if nodes else [0.0] * len(pairs)
    products = [[0.0] * count for _ in range(count)]
    for (i, j), value in zip(pairs, sums, strict=True):
        products[i][j] = products[j][i] = value
    return products
