"""The compiled step against the eager one, bit for bit. CPU only: that is where it runs."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

import fused_merge as fm
from fused_merge import compiled
from fused_merge.backend import why_not_compiled

assert why_not_compiled(torch.device("cpu")) is None


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch):
    """Every case is compiled for itself, and a case that cannot be compiled whole fails."""
    torch.compiler.reset()
    strict = torch.compile(compiled.eager_merging_adamw_, dynamic=True, fullgraph=True)
    monkeypatch.setattr(compiled, "_compiled", lambda: strict)


def parameters(dtype: torch.dtype, seed: int) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

    tensors = {"matrix": draw(33, 65), "other": draw(17, 129), "vector": draw(1001), "cube": draw(3, 5, 7)}
    return nn.ParameterDict(tensors | {"one": draw(1), "empty": draw(0, 4), "permuted": nn.Parameter(draw(20, 30).t())})


CASES = [
    {"method": "ondare", "reserve_rate": 1.0, "weight_decay": 0.1},
    {"method": "ondare", "reserve_rate": 0.3, "max_grad_norm": 1.0},
    {"method": "onties", "reserve_rate": 0.3, "merge_every": 2, "weight_decay": 0.1},
    {"method": "onties", "reserve_rate": 0.3, "vote": "paper", "project": "conflict", "project_on": "update"},
    {"method": "onproj", "project": "onto", "project_over": "rows", "project_strength": 0.5},
    {"method": "onsoft", "reserve_rate": 0.3, "rounding": "stochastic"},
    {"method": "ondare", "reserve_rate": 0.3, "dtype": torch.bfloat16, "master": "split"},
    {"method": "ondare", "reserve_rate": 0.3, "dtype": torch.bfloat16, "rounding": "stochastic"},
    {"method": "ondare", "reserve_rate": 0.3, "dtype": torch.float64},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_compiled_equals_eager(case):
    options = dict(case)
    dtype = options.pop("dtype", torch.float32)
    delta = fm.ReferenceDelta.from_models(dict(parameters(dtype, 0).items()), dict(parameters(dtype, 1).items()))
    runs = []
    for impl in ("eager", "compiled"):
        params = parameters(dtype, 1)
        optimizer = fm.MergingAdamW(
            params.named_parameters(), reference_delta=delta, lr=1e-2, alpha=0.05, seed=3, impl=impl, **options
        )
        generator = torch.Generator().manual_seed(2)
        for _ in range(3):
            for parameter in params.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()
        runs.append([(p.detach(), optimizer.state[p]) for p in params.values()])
    for (ours, our_state), (theirs, their_state) in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)
        assert our_state.keys() == their_state.keys()
        assert all(torch.equal(our_state[key], their_state[key]) for key in our_state)


def test_statistics_are_those_of_eager():
    delta = fm.ReferenceDelta.from_models(dict(parameters(torch.float32, 0)), dict(parameters(torch.float32, 1)))
    gathered = []
    for impl in ("eager", "compiled"):
        params = parameters(torch.float32, 1)
        optimizer = fm.OnTIESAdamW(
            params.named_parameters(), reference_delta=delta, lr=1e-2, reserve_rate=0.3, stats_every=1, impl=impl
        )
        for parameter in params.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        gathered.append(optimizer.merge_stats())
    assert gathered[0] == gathered[1]
    assert gathered[0]["matrix"]["kept_tau"] > 0.29


def test_one_form_serves_all_sizes_seeds_and_steps():
    params = parameters(torch.float32, 1)
    delta = fm.ReferenceDelta.from_models(dict(parameters(torch.float32, 0)), dict(params))
    optimizer = fm.OnDAREAdamW(params.named_parameters(), reference_delta=delta, reserve_rate=0.3, impl="compiled")
    for parameter in params.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.compiler.set_stance("fail_on_recompile"):
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        optimizer.step()


def test_compiling_is_announced_once(monkeypatch, caplog):
    monkeypatch.undo()
    compiled._compiled.cache_clear()
    with caplog.at_level(logging.WARNING, "fused_merge"):
        compiled._compiled()
        compiled._compiled()
    assert [record.getMessage() for record in caplog.records] == [
        "compiling the optimizer step for the CPU: the first step takes some seconds"
    ]
