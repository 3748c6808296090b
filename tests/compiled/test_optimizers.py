"""Whole runs of the optimizers, compiled and eager: the same bits of weights and states, the same statistics."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from one_tensor import draw, joined
from torch import nn

import fused_merge as fm
from fused_merge.compiled import launch
from fused_merge.functional import backend
from fused_merge.optim import verification

BF16, FP16 = torch.bfloat16, torch.float16
SHAPES = {"embed": (37, 65), "matrix": (130, 65), "vector": (1001,), "one": (1,), "scalar": (), "empty": (0, 4)}


def parameters(dtype: torch.dtype, seed: int) -> nn.ParameterDict:
    return nn.ParameterDict({name: draw(shape, seed=seed, dtype=dtype) for name, shape in SHAPES.items()})


def delta_for(dtype: torch.dtype) -> fm.ReferenceDelta:
    """A delta of which the embedding has fewer rows than that which is trained."""
    ends = [{name: p.detach() for name, p in parameters(dtype, seed).items()} for seed in range(2)]
    for end in ends:
        end["embed"] = end["embed"][:29]
    return fm.ReferenceDelta.from_models(*ends)


def fill_gradients(params: nn.ParameterDict, index: int) -> None:
    for i, parameter in enumerate(params.values()):
        parameter.grad = draw(parameter.shape, seed=10 * index + i, dtype=parameter.dtype)


def snapshot(params, optimizer):
    return {
        name: {"param": p.detach().clone()} | {key: value.clone() for key, value in optimizer.state.get(p, {}).items()}
        for name, p in params.items()
    }


CASES = [
    {"method": "onsoft", "reserve_rate": 0.3, "max_grad_norm": 1.0, "dtype": BF16, "master": "split"},
    {"method": "onties", "reserve_rate": 0.3, "merge_every": 2, "weight_decay": 0.1, "stats_every": 1},
    {"method": "onties", "reserve_rate": 0.05, "stats_every": 2, "maximize": True},
    {"method": "onties", "reserve_rate": 0.3, "vote": "paper", "project": "conflict", "project_on": "update"}
    | {"dtype": BF16, "rounding": "stochastic"},
    {"method": "onproj", "project": "onto", "project_over": "rows", "project_strength": 0.5, "stats_every": 1},
    {"method": "onproj", "project": "conflict", "dtype": FP16, "master": "fp32", "merge_every": 3},
    {"method": "ondare", "reserve_rate": 0.02, "weight_decay": 0.1},
    {"method": "ondare", "reserve_rate": 0.3, "state_dtype": BF16, "seed": -7, "stats_every": 1},
    {"method": "ondare", "reserve_rate": 1.0, "dtype": BF16, "rounding": "stochastic", "merge_every": 2},
]


@pytest.mark.parametrize("case", CASES, ids=joined)
def test_merging_adamw(case):
    options = {"lr": 1e-2, "alpha": 0.05, "seed": 3, "missing": "plain"} | case
    dtype = options.pop("dtype", torch.float32)
    delta, runs, statistics = delta_for(dtype), [], []
    for impl in ("eager", "compiled"):
        params = parameters(dtype, 1)
        optimizer = fm.MergingAdamW(params.named_parameters(), reference_delta=delta, impl=impl, **options)
        for index in range(5):
            fill_gradients(params, index)
            optimizer.param_groups[0]["lr"] = [1e-2, 5e-3, 0.0, 1e-2, 1e-4][index]
            optimizer.step()
        runs.append(snapshot(params, optimizer))
        statistics.append(optimizer.merge_stats() if "stats_every" in case else {})
    assert_same_bits(*runs)
    assert statistics[0] == statistics[1]
    assert bool(statistics[0]) == ("stats_every" in case)


ELSEWHERE = [
    {"method": "onties", "reserve_rate": 0.3, "project": "conflict", "dtype": BF16, "rounding": "stochastic"},
    {"method": "onties", "reserve_rate": 0.02, "merge_every": 3, "stats_every": 1},
    {"method": "ondare", "reserve_rate": 0.3, "merge_every": 2, "stats_every": 2},
    {"method": "onsoft", "reserve_rate": 0.3},
    {"method": "onproj", "project": "onto", "project_over": "rows", "merge_every": 2},
]


@pytest.mark.parametrize("case", ELSEWHERE, ids=joined)
def test_merges_around_sgd(case):
    options = {"alpha": 0.05, "seed": 3, "missing": "plain"} | case
    dtype = options.pop("dtype", torch.float32)
    delta, runs = delta_for(dtype), []
    for impl in ("eager", "compiled"):
        params = parameters(dtype, 1)
        optimizer = torch.optim.SGD(params.named_parameters(), lr=1e-2, momentum=0.9)
        merging = fm.OnlineMerging(optimizer, reference_delta=delta, impl=impl, **options)
        for index in range(5):
            fill_gradients(params, index)
            optimizer.step()
        runs.append((snapshot(params, optimizer), merging.merge_stats() if "stats_every" in case else {}))
    assert_same_bits(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert bool(runs[0][1]) == ("stats_every" in case)


def test_closures_and_resumed_runs():
    delta, runs = delta_for(torch.float32), []
    for impl in ("eager", "compiled"):
        params = parameters(torch.float32, 1)
        options = {"lr": 1e-2, "method": "onties", "reserve_rate": 0.1, "merge_every": 2, "missing": "plain"}
        optimizer = fm.MergingAdamW(params.named_parameters(), reference_delta=delta, impl=impl, **options)
        for index in range(4):
            if index == 2:
                other = fm.MergingAdamW(params.named_parameters(), reference_delta=delta, impl=impl, **options)
                other.load_state_dict(optimizer.state_dict())
                optimizer = other

            def closure(params=params, index=index):
                fill_gradients(params, index)
                return torch.ones(())

            assert optimizer.step(closure) == 1
        runs.append(snapshot(params, optimizer))
    assert_same_bits(*runs)


def test_verify_compares_compiled_steps_and_names_what_differs(monkeypatch):
    params = parameters(torch.float32, 1)
    optimizer = fm.OnTIESAdamW(
        params.named_parameters(), reference_delta=delta_for(torch.float32), lr=1e-2, missing="plain", impl="compiled"
    )
    fm.verify(optimizer, steps=2)
    for index in range(2):
        fill_gradients(params, index)
        optimizer.step()
    fm.verify(optimizer, steps=1)
    copy = verification._copy

    def wrong(o):
        made = copy(o)
        if o.name == "matrix" and made.exp_avg is not None:
            made.exp_avg[0, 0] += 1
        return made

    monkeypatch.setattr(verification, "_copy", wrong)
    fill_gradients(params, 2)
    with pytest.raises(RuntimeError, match=r"the kernel and the eager code differ in .* of 'matrix'"):
        optimizer.step()


def test_auto_steps_large_models_by_compiled_code(monkeypatch):
    ran = []
    run = launch.run
    monkeypatch.setattr(launch, "run", lambda prepared: ran.append(len(prepared.launch.names)) or run(prepared))
    total = sum(p.numel() for p in parameters(torch.float32, 0).values())
    # The embedding is stepped in two parts.
    tensors = len(SHAPES) + 1
    monkeypatch.setattr(backend, "PER_TENSOR", 100)
    for threshold, expected in ((total + 100 * tensors, [tensors]), (2 * total + 100 * tensors, [])):
        monkeypatch.setattr(backend, "COMPILE_FROM", threshold)
        ran.clear()
        params = parameters(torch.float32, 1)
        delta = delta_for(torch.float32)
        optimizer = fm.OnDAREAdamW(params.named_parameters(), reference_delta=delta, lr=1e-2, missing="plain")
        fill_gradients(params, 0)
        optimizer.step()
        assert ran == expected
