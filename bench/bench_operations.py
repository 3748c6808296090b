"""What stands around a step, on a CPU, each beside what torch has for it: a part of `make bench`; none has a target."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from paired import nothing, pair_up, row_of
from published import random_drop, top_magnitudes
from step_cases import BF16, DENSE_TAU, FUSED, ONE, RANDOM, RANKED, RATE, SPARSE_TAU, tensors_of

import fused_merge as fm
from fused_merge import functional
from fused_merge.delta.tensors import Sparsity


def inner_products(tensors):
    (x,), (y,) = tensors.moments
    return partial(functional.inner_products, [x], [y]), partial(torch.dot, x.view(-1), y.view(-1))


def sparsify(tensors, method, plain):
    sparsity = Sparsity(method, RATE, 0)
    dense = [tensors.delta.tensor(name).float() for name in tensors.names]
    return (
        lambda: [tensors.delta.sparse(name, sparsity) for name in tensors.names],
        lambda: [plain(tau, RATE) for tau in dense],
    )


def bind(tensors, options):
    named = tensors.named(tensors.params()).items()
    return lambda: fm.MergingAdamW(named, reference_delta=tensors.delta, **options).bind(), tensors.fused


# What is paired, the bytes per element that have to move, and the name of the baseline.
OPERATIONS = {
    "inner products": (inner_products, 2 * 4, "torch.dot"),
    "sparsify tau, random": (
        partial(sparsify, method="random", plain=random_drop), DENSE_TAU + SPARSE_TAU, "torch.bernoulli"
    ),
    "sparsify tau, magnitude": (
        partial(sparsify, method="magnitude", plain=top_magnitudes), DENSE_TAU + SPARSE_TAU, "torch.kthvalue"
    ),
    "bind, ondare": (partial(bind, options=RANDOM), DENSE_TAU + SPARSE_TAU, FUSED),
    "bind, onties": (partial(bind, options=RANKED), DENSE_TAU + SPARSE_TAU, FUSED),
}  # fmt: skip


@pytest.mark.parametrize("provider", OPERATIONS)
@pytest.mark.benchmark(group="operation")
def bench_operation(benchmark, provider):
    tensors = tensors_of(ONE)
    make, moved, baseline = OPERATIONS[provider]
    turns = pair_up(benchmark, *make(tensors), nothing)
    benchmark.extra_info.update(
        row_of(
            turns,
            provider=provider,
            case=f"around a step, {ONE}",
            dtype=str(torch.float32 if provider == "inner products" else BF16).removeprefix("torch."),
            parameters=tensors.numel,
            bytes_per_parameter=moved,
            baseline=baseline,
        )._asdict()
    )
