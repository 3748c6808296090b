"""A merged step against torch's own AdamW, in one run: `pytest bench/bench_merging_adamw.py`.

On a GPU where there is one, else on the CPU. Compare within a group: `Name` says who took the step, `extra_info` in the
JSON (`--benchmark-json FILE`) how many bytes per parameter it needs and what that came to in GB/s.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

import fused_merge as fm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# 201 MB of fp32 weights: more than any cache, as a model's are.
WIDTH = 2048

# Bytes per fp32 parameter: theta, m and v read and written, g read; tau read.
ADAMW = 28
SPARSE_TAU = 1 / 8 + 4 / 1024 + 0.01 * 4


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(12)]).to(DEVICE)


def adamw(params: nn.Module, **options: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params.parameters(), lr=1e-6, weight_decay=0.0, **options)


def merging(params: nn.Module, method: str, reserve_rate: float, impl: str) -> torch.optim.Optimizer:
    delta = fm.ReferenceDelta.from_models(model(1), params)
    return fm.MergingAdamW(
        params.named_parameters(), reference_delta=delta, method=method, reserve_rate=reserve_rate, impl=impl
    )


Build = Callable[[nn.Module], torch.optim.Optimizer]
PROVIDERS: dict[str, tuple[Build, float]] = {
    "torch fused": (lambda params: adamw(params, fused=True), ADAMW),
    "torch foreach": (lambda params: adamw(params, foreach=True), ADAMW),
}
# What `auto` chooses (Triton on a GPU, compiled on a CPU at this size), and the eager code.
for impl in ("auto", "eager"):
    for method, rate, tau in (("ondare", 1.0, 4.0), ("ondare", 0.01, SPARSE_TAU), ("onties", 0.01, SPARSE_TAU)):
        build = partial(merging, method=method, reserve_rate=rate, impl=impl)
        PROVIDERS[f"{method}, p = {rate}, {impl}"] = (build, ADAMW + tau)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.benchmark(group=f"one step, 12 x {WIDTH} x {WIDTH} fp32, {DEVICE.type}")
def bench_step(benchmark, provider):
    build, bytes_per_parameter = PROVIDERS[provider]
    params = model(0)
    optimizer = build(params)
    for parameter in params.parameters():
        parameter.grad = torch.randn_like(parameter)

    def step() -> None:
        optimizer.step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=10, warmup_rounds=2)
    parameters = sum(parameter.numel() for parameter in params.parameters())
    benchmark.extra_info.update(
        parameters=parameters,
        bytes_per_parameter=bytes_per_parameter,
        gigabytes_per_second=parameters * bytes_per_parameter / benchmark.stats["median"] / 1e9,
    )
