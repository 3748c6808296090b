"""Eight points of a path at once against eight `torch.lerp`, on a CPU: a part of `make bench`.

A point reads two values of b bytes and writes one. At once that makes (2 + 8)*b bytes per element, which a plain copy
in the same run moves too; eight lerps move 24*b.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from paired import nothing, pair_up, row_of

import fused_merge as fm
from fused_merge import functional

RATIOS = [k / 9 for k in range(1, 9)]
ELEMENTS = {"4.2 M": 2**22, "100 M": 100_000_000}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Three times faster.
TARGET = 1 / 3
# Of a pair: at the larger size a round takes long.
SECONDS = 3.0


class Points(NamedTuple):
    """Two ends and eight tensors between them."""

    base: torch.Tensor
    tuned: torch.Tensor
    outs: list[torch.Tensor]


def lerps(points):
    for ratio, out in zip(RATIOS, points.outs, strict=True):
        torch.lerp(points.base, points.tuned, ratio, out=out)


def new_lerps(points):
    return [torch.lerp(points.base, points.tuned, ratio) for ratio in RATIOS]


def at_once(points):
    return lambda: functional.interpolate([points.base], [points.tuned], RATIOS, [points.outs])


def at_once_anew(points):
    return lambda: fm.interpolate(points.base, points.tuned, RATIOS)


def copy(points):
    # Half of the bytes are read and half are written.
    source = points.base.repeat((2 + len(RATIOS)) // 2)
    return partial(torch.empty_like(source).copy_, source)


INTO_TENSORS, INTO_NEW = ("8 x torch.lerp", lerps), ("8 x torch.lerp, new tensors", new_lerps)
# Who is measured, against what, and with which target.
PROVIDERS = {
    "functional.interpolate": (at_once, INTO_TENSORS, TARGET),
    "copy of as many bytes": (copy, INTO_TENSORS, None),
    "fm.interpolate, new tensors": (at_once_anew, INTO_NEW, None),
}


@cache
def ends(elements, dtype):
    torch.manual_seed(0)
    return [torch.randn(elements).to(dtype) for _ in range(2)]


@pytest.fixture(scope="module", autouse=True)
def _ends_are_let_go():
    yield
    ends.cache_clear()


@pytest.mark.parametrize("size", ELEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.benchmark(group="interpolation")
def bench_interpolation(benchmark, size, dtype, provider):
    base, tuned = ends(ELEMENTS[size], DTYPES[dtype])
    points = Points(base, tuned, [torch.zeros_like(base) for _ in RATIOS])
    make, (baseline, by_lerp), target = PROVIDERS[provider]
    turns = pair_up(benchmark, make(points), partial(by_lerp, points), nothing, SECONDS)
    benchmark.extra_info.update(
        row_of(
            turns,
            provider=provider,
            case=f"8 points, {size}",
            dtype=dtype,
            parameters=base.numel(),
            bytes_per_parameter=(2 + len(RATIOS)) * base.itemsize,
            baseline=baseline,
            target=target,
        )._asdict()
    )
