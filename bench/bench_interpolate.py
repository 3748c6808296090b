"""R points of a path at once against R `torch.lerp`, on a CPU: a part of `make bench`.

A point reads two values of b bytes and writes one. At once that makes (2 + R)*b bytes per element, which a plain copy
in the same run moves too; R lerps move 3*R*b.
"""

from __future__ import annotations

from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from paired import nothing, pair_up, row_of

import fused_merge as fm
from fused_merge import functional

RATIOS = {8: [k / 9 for k in range(1, 9)], 1: [0.3]}
ELEMENTS = {"4.2 M": 2**22, "100 M": 100_000_000}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Eight points three times faster, one as fast.
TARGETS = {8: 1 / 3, 1: 1.0}
# Of a pair: at the larger size a round takes long.
SECONDS = 3.0


class Points(NamedTuple):
    """Two ends, and tensors between them with their ratios."""

    base: torch.Tensor
    tuned: torch.Tensor
    ratios: list[float]
    outs: list[torch.Tensor]


def lerps(points):
    for ratio, out in zip(points.ratios, points.outs, strict=True):
        torch.lerp(points.base, points.tuned, ratio, out=out)


def new_lerps(points):
    return [torch.lerp(points.base, points.tuned, ratio) for ratio in points.ratios]


def at_once(points):
    return lambda: functional.interpolate([points.base], [points.tuned], points.ratios, [points.outs])


def at_once_anew(points):
    return lambda: fm.interpolate(points.base, points.tuned, points.ratios)


def copy(points):
    # Half of the bytes are read and half are written.
    source = torch.ones((2 + len(points.ratios)) * points.base.numel() // 2, dtype=points.base.dtype)
    return partial(torch.empty_like(source).copy_, source)


INTO_TENSORS, INTO_NEW = ("torch.lerp", lerps), ("torch.lerp, new tensors", new_lerps)
# Who is measured, and against what; the first has a target.
OURS = "functional.interpolate"
PROVIDERS = {
    OURS: (at_once, INTO_TENSORS),
    "copy of as many bytes": (copy, INTO_TENSORS),
    "fm.interpolate, new tensors": (at_once_anew, INTO_NEW),
}


@cache
def ends(elements, dtype):
    torch.manual_seed(0)
    return [torch.randn(elements).to(dtype) for _ in range(2)]


@pytest.fixture(scope="module", autouse=True)
def _ends_are_let_go():
    yield
    ends.cache_clear()


@pytest.mark.parametrize("count", RATIOS, ids="points={}".format)
@pytest.mark.parametrize("size", ELEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.benchmark(group="interpolation")
def bench_interpolation(benchmark, count, size, dtype, provider):
    base, tuned = ends(ELEMENTS[size], DTYPES[dtype])
    points = Points(base, tuned, RATIOS[count], [torch.zeros_like(base) for _ in range(count)])
    make, (baseline, by_lerp) = PROVIDERS[provider]
    turns = pair_up(benchmark, make(points), partial(by_lerp, points), nothing, SECONDS)
    benchmark.extra_info.update(
        row_of(
            turns,
            provider=provider,
            case=f"{count} point{'s' if count > 1 else ''}, {size}",
            dtype=dtype,
            parameters=base.numel(),
            bytes_per_parameter=(2 + count) * base.itemsize,
            baseline=f"{count} x {baseline}",
            target=TARGETS[count] if provider == OURS else None,
        )._asdict()
    )
