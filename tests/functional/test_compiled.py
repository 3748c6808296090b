"""Compiled code against eager code, bit for bit. CPU only: that is where it runs."""

from __future__ import annotations

import logging

import pytest
import torch
from bits import assert_same_bits, same_bits
from models import snapshot
from one_tensor import draw, joined, optimizer_of
from torch import nn

import fused_merge as fm
from fused_merge.functional import compiled
from fused_merge.functional.backend import why_not_compiled

assert why_not_compiled(torch.device("cpu")) is None


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    """Every case is compiled for itself, and a case that cannot be compiled whole fails."""
    torch.compiler.reset()
    strict = torch.compile(compiled.eager_merging_adamw_, dynamic=True, fullgraph=True)
    monkeypatch.setattr(compiled, "_compiled_step", lambda: strict)


def parameters(dtype: torch.dtype, seed: int) -> nn.ParameterDict:
    shapes = {"matrix": (33, 65), "other": (17, 29), "vector": (1001,), "one": (1,), "empty": (0, 4)}
    return nn.ParameterDict({name: draw(shape, seed=seed, dtype=dtype) for name, shape in shapes.items()})


# Each is compiled anew: few cases, which with `test_strides_are_kept` have every method and each way to round, to merge
# and to project.
CASES = [
    {"method": "onsoft", "reserve_rate": 0.3, "max_grad_norm": 1.0, "dtype": torch.bfloat16, "master": "split"},
    {"method": "onties", "reserve_rate": 0.3, "merge_every": 2, "weight_decay": 0.1, "stats_every": 1},
    {"method": "onties", "reserve_rate": 0.3, "vote": "paper", "project": "conflict", "project_on": "update"}
    | {"dtype": torch.bfloat16, "rounding": "stochastic"},
    {"method": "onproj", "project": "onto", "project_over": "rows", "project_strength": 0.5},
    {"method": "ondare", "reserve_rate": 0.3, "dtype": torch.float64},
]


@pytest.mark.parametrize("case", CASES, ids=joined)
def test_compiled_equals_eager(case):
    options = {"lr": 1e-2, "alpha": 0.05, "seed": 3} | case
    dtype = options.pop("dtype", torch.float32)
    delta = fm.ReferenceDelta.from_models(dict(parameters(dtype, 0).items()), dict(parameters(dtype, 1).items()))
    runs, statistics = [], []
    for impl in ("eager", "compiled"):
        params = parameters(dtype, 1)
        optimizer = fm.MergingAdamW(params.named_parameters(), reference_delta=delta, impl=impl, **options)
        for step in range(3):
            for i, parameter in enumerate(params.values()):
                parameter.grad = draw(parameter.shape, seed=10 * step + i, dtype=dtype)
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            # One form serves all steps and learning rates.
            with torch.compiler.set_stance("fail_on_recompile" if step == 2 else "default"):
                optimizer.step()
        runs.append(snapshot(optimizer))
        statistics.append(optimizer.merge_stats() if "stats_every" in case else {"matrix": {"kept_tau": 1.0}})
    assert_same_bits(*runs)
    assert statistics[0] == statistics[1]
    assert statistics[0]["matrix"]["kept_tau"] > 0.29


ELSEWHERE = [
    {"method": "onties", "reserve_rate": 0.3, "project": "conflict", "dtype": torch.bfloat16, "rounding": "stochastic"},
    {"method": "ondare", "reserve_rate": 0.3, "merge_every": 2, "stats_every": 2},
]


@pytest.mark.parametrize("case", ELSEWHERE, ids=joined)
def test_what_another_optimizer_has_added(case):
    options = {"alpha": 0.05, "seed": 3} | case
    dtype = options.pop("dtype", torch.float32)
    delta = fm.ReferenceDelta.from_models(dict(parameters(dtype, 0).items()), dict(parameters(dtype, 1).items()))
    runs = []
    for impl in ("eager", "compiled"):
        params = parameters(dtype, 1)
        optimizer = torch.optim.SGD(params.named_parameters(), lr=1e-2)
        merging = fm.OnlineMerging(optimizer, reference_delta=delta, impl=impl, **options)
        for step in range(4):
            for i, parameter in enumerate(params.values()):
                parameter.grad = draw(parameter.shape, seed=10 * step + i, dtype=dtype)
            with torch.compiler.set_stance("fail_on_recompile" if step == 3 else "default"):
                optimizer.step()
        runs.append((dict(params.items()), merging.merge_stats() if "stats_every" in case else {}))
    assert_same_bits(*({name: p.detach() for name, p in found.items()} for found, _ in runs))
    assert runs[0][1] == runs[1][1]


def test_strides_are_kept():
    matrix = draw((20, 30))
    made = []
    for impl in ("eager", "compiled"):
        param = nn.Parameter(matrix.clone().t())
        param.grad = matrix.t().clone()
        options = {"reserve_rate": 0.3, "rounding": "stochastic", "impl": impl}
        optimizer_of(param, 0.1 * matrix.t(), **options).step()
        assert param.stride() == (1, 30)
        made.append(param.detach())
    assert same_bits(*made)


def test_compiling_is_announced_once(monkeypatch, caplog):
    monkeypatch.undo()
    compiled._compiled_step.cache_clear()
    with caplog.at_level(logging.WARNING, "fused_merge"):
        compiled._compiled_step()
        compiled._compiled_step()
    assert [record.getMessage() for record in caplog.records] == [
        "compiling the optimizer step for the CPU: the first step takes some seconds"
    ]
