"""Compiled code against eager code by size, on a CPU, where `impl="auto"` chooses: a part of `make bench`.

What `COMPILE_FROM` and `PER_TENSOR` of `fused_merge.functional.backend` were chosen by.
"""

from __future__ import annotations

import pytest
from paired import pair_up, row_of
from step_cases import TARGETS, Tensors, merging

# One tensor, ten, and a hundred.
LISTS = {"10^4": [(100, 100)], "10^5": 10 * [(100, 100)], "10^6": 100 * [(100, 100)]}
METHODS = ("ondare, p = 1", "ondare, p = 0.01", "onties, p = 0.01", "onproj, tensor")


@pytest.mark.parametrize("size", LISTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.benchmark(group="auto")
def bench_auto(benchmark, method, size):
    tensors, (options, (moved, _), _) = Tensors(LISTS[size]), TARGETS[method]
    compiled, eager = (merging(tensors, impl=impl, **options) for impl in ("compiled", "eager"))
    turns = pair_up(benchmark, compiled, eager, tensors.refresh)
    benchmark.extra_info.update(
        row_of(
            turns,
            provider=f"{method}, {size} parameters",
            case="compiled against eager code",
            dtype="float32",
            parameters=tensors.numel,
            bytes_per_parameter=moved,
            baseline="eager",
        )._asdict()
    )
