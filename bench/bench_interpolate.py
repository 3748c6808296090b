"""R points of a line at once against R times `torch.lerp`, in one run: `pytest bench/bench_interpolate.py`.

On a GPU where there is one, else on the CPU. R points at once need (2 + R)*b bytes per element of b bytes, R lerps, and
R points in compiled code, 3*R*b; `extra_info` in the JSON (`--benchmark-json FILE`) has what that came to in GB/s.
"""

from __future__ import annotations

import pytest
import torch

import fused_merge as fm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ELEMENTS = 2**28 if DEVICE.type == "cuda" else 2**22
RATIOS = [k / 9 for k in range(1, 9)]


def at_once(base: torch.Tensor, tuned: torch.Tensor) -> None:
    fm.interpolate(base, tuned, RATIOS)


def compiled(base: torch.Tensor, tuned: torch.Tensor) -> None:
    fm.interpolate(base, tuned, RATIOS, impl="compiled")


def one_by_one(base: torch.Tensor, tuned: torch.Tensor) -> None:
    torch.stack([torch.lerp(base, tuned, ratio) for ratio in RATIOS])


PROVIDERS = {"fused_merge": (at_once, 2 + len(RATIOS)), "torch.lerp": (one_by_one, 3 * len(RATIOS))}
if DEVICE.type == "cpu":
    PROVIDERS["fused_merge, compiled"] = (compiled, 3 * len(RATIOS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.benchmark(group=f"{len(RATIOS)} ratios of {ELEMENTS} elements, {DEVICE.type}")
def bench_interpolation(benchmark, provider, dtype):
    run, transfers = PROVIDERS[provider]
    base, tuned = (torch.randn(ELEMENTS, device=DEVICE).to(dtype) for _ in range(2))

    def points() -> None:
        run(base, tuned)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(points, rounds=10, warmup_rounds=2)
    moved = transfers * dtype.itemsize * ELEMENTS
    benchmark.extra_info.update(
        elements=ELEMENTS, bytes_moved=moved, gigabytes_per_second=moved / benchmark.stats["median"] / 1e9
    )
