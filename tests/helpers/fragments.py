"""Parts of tensors, as processes hold them, and processes that add up: as threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise, product

import torch

from fused_merge.distributed import Fragment
from fused_merge.eager.shard import Shard, ShardIndex


def fragment(shape, box, elements=None, groups=("all who hold a part",)):
    """The fragment of a box of a tensor, or of some of its elements, which must be runs at equal distances."""
    box = tuple(box)
    held = torch.arange(torch.Size(shape).numel()).view(shape)[box]
    held = held.flatten() if elements is None else held.flatten()[elements]
    breaks = (held.diff() != 1).nonzero().flatten() + 1
    inner = int(breaks[0]) if len(breaks) else max(len(held), 1)
    distance = int(held[inner] - held[0]) if len(breaks) else inner
    own = torch.arange(len(held))
    offset = int(held[0]) if len(held) else 0
    assert torch.equal(held, offset + own // inner * distance + own % inner)
    return Fragment(Shard(ShardIndex(offset, inner, distance), tuple(shape), tuple(groups)), box, elements)


def grids(shape, *, numbered=False):
    """Ways to cut a tensor along one or two dimensions, as lists of boxes; only those that `ShardIndex` can number."""
    whole = [slice(0, n) for n in shape]
    cut = {dim: [slice(a, b) for a, b in pairwise([0, *sorted({n // 3, n // 2, n})])] for dim, n in enumerate(shape)}
    for dim in range(len(shape)):
        yield [(*whole[:dim], side, *whole[dim + 1 :]) for side in cut[dim]]
        for other in range(min(dim, 1) if numbered else dim):
            sides = [cut[each] if each in (dim, other) else [whole[each]] for each in range(len(shape))]
            yield list(product(*sides))
    yield [tuple(whole), tuple(slice(n, n) for n in shape)]


def ranges(numel):
    """Ranges of elements that make up a tensor: uneven ones, with an empty one among them."""
    ends = [0, numel // 7, numel // 2, numel // 2, numel]
    return [slice(a, b) for a, b in pairwise(ends)]


def together(monkeypatch, module, calls):
    """Call functions in threads that add up over one another where the module's `sum_over` is called."""
    barrier, given, numbers = threading.Barrier(len(calls)), [None] * len(calls), threading.local()

    def sum_over(values, groups):
        given[numbers.own] = values
        barrier.wait(60)
        total = torch.stack(given).sum(0)
        barrier.wait(60)
        return total

    def run(number, call):
        numbers.own = number
        return call()

    monkeypatch.setattr(module, "sum_over", sum_over)
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, range(len(calls)), calls))
