"""Projection onto the delta: by hand, in degenerate cases, and against numpy in every combination of options."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from one_tensor import HYPER, assert_near, delta_of, draw, joined, optimizer_of, parameter
from torch import nn

import fused_merge as fm
from fused_merge.eager.projection import RESIDUE, project
from fused_merge.methods import METHODS

NAN = float("nan")


def run_project(x, tau, how="conflict", *, strength=1.0, rows=False, ascent=False):
    return project(torch.tensor(x), torch.tensor(tau), how, strength=strength, rows=rows, ascent=ascent).tolist()


# <x, tau> = 4 and <tau, tau> = 4: c = 1.
X, TAU, REST = [3.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [2.0, 0.0, -1.0, -1.0]


def negative(values):
    return [-value for value in values]


def test_a_gradient_conflicts_along_tau_and_an_update_against_it():
    assert run_project(X, TAU, ascent=True) == REST
    assert run_project(negative(X), TAU, ascent=True) == negative(X)
    assert run_project(X, TAU) == X
    assert run_project(negative(X), TAU) == negative(REST)


@pytest.mark.parametrize("ascent", [False, True])
def test_onto_takes_the_component_whatever_its_sign(ascent):
    assert run_project(X, TAU, "onto", ascent=ascent) == [1.0] * 4
    assert run_project(negative(X), TAU, "onto", ascent=ascent) == [-1.0] * 4


@pytest.mark.parametrize(
    ("strength", "expected"), [(0.0, X), (0.25, [2.5, 1.0, 0.25, 0.25]), (0.5, [2.0, 1.0, 0.5, 0.5]), (1.0, [1.0] * 4)]
)
def test_strength_lies_between(strength, expected):
    assert run_project(X, TAU, "onto", strength=strength) == expected


def test_each_row_has_its_own_coefficient():
    # c = 2 and -2; over the whole tensor the two cancel, and nothing conflicts.
    x, tau = [[3.0, 1.0], [-1.0, -3.0]], [[1.0, 1.0], [1.0, 1.0]]
    assert run_project(x, tau, rows=True, ascent=True) == [[1.0, -1.0], [-1.0, -3.0]]
    assert run_project(x, tau, rows=True) == [[3.0, 1.0], [1.0, -1.0]]
    assert run_project(x, tau, "onto", rows=True) == [[2.0, 2.0], [-2.0, -2.0]]
    assert run_project(x, tau) == x
    assert run_project(x, tau, ascent=True) == x
    assert run_project(x, tau, "onto") == [[0.0, 0.0], [0.0, 0.0]]


def test_a_row_is_all_that_shares_the_first_index():
    x, tau = [[[3.0, 1.0], [0.0, 0.0]], [[-3.0, -1.0], [0.0, 0.0]]], [[[1.0, 1.0], [1.0, 1.0]]] * 2
    assert run_project(x, tau, rows=True) == [x[0], [[-2.0, 0.0], [1.0, 1.0]]]


@pytest.mark.parametrize("how", ["conflict", "onto"])
def test_fewer_than_two_dimensions_are_one_row(how):
    for x, tau in ((negative(X), TAU), (-3.0, 2.0), (3.0, 2.0)):
        assert run_project(x, tau, how, rows=True) == run_project(x, tau, how)
    # All of a number lies along a number.
    assert run_project(-3.0, 2.0, how, rows=True) == (0.0 if how == "conflict" else -3.0)


@pytest.mark.parametrize(
    ("how", "ascent", "others"),
    [
        ("conflict", False, [[0.0, 0.0], [2.0, 2.0]]),
        ("conflict", True, [[-2.0, -2.0], [0.0, 0.0]]),
        ("onto", False, [[-2.0, -2.0], [2.0, 2.0]]),
    ],
)
def test_where_tau_is_zero_nothing_is_projected(how, ascent, others):
    x = [[3.0, -1.0], [-2.0, -2.0], [2.0, 2.0]]
    assert run_project(x, [[0.0, 0.0]] * 3, how, ascent=ascent) == x
    tau = [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    assert run_project(x, tau, how, rows=True, ascent=ascent) == [x[0], *others]


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("how", ["conflict", "onto"])
def test_nothing_stays_nothing(shape, rows, how):
    result = project(torch.zeros(shape), torch.zeros(shape), how, strength=1.0, rows=rows, ascent=True)
    assert result.shape == shape


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.integers(0, 2**32), st.integers(1, 3000), st.floats(1e-6, 1e6), st.booleans())
def test_what_is_parallel_to_tau_leaves_exact_zeros(seed, n, factor, rows):
    generator = torch.Generator().manual_seed(seed)
    tau = torch.randn(2, n, generator=generator) * 1e-2
    x = factor * tau
    for step, ascent in ((x, True), (-x, False)):
        assert not project(step, tau, "conflict", strength=1.0, rows=rows, ascent=ascent).any()


def test_what_is_above_the_residue_stays():
    # <tau, tau> = 1 and <x, tau> = 1: c = 1; the other element has no component along tau.
    for small in (RESIDUE, 2.0**-100):
        assert run_project([1.0, small], [1.0, 0.0], ascent=True) == [0.0, small]
    # c = 1 up to rounding in both, and what is left of the first element is x - tau.
    tau = torch.tensor([1.0] + [2.0] * 1023)
    for excess, kept in ((2.0**-17, True), (2.0**-20, False)):
        x = tau.clone()
        x[0] += excess
        rest = project(x, tau, "conflict", strength=1.0, rows=False, ascent=True)
        assert bool(rest[0] != 0) == kept
        assert not rest[1:].any()


def test_a_nan_is_not_in_conflict_and_touches_no_other_element():
    x = [[3.0, NAN], [-3.0, -1.0]]
    tau = [[1.0, 1.0], [1.0, 1.0]]
    for ascent in (False, True):
        rest = torch.tensor(run_project(x, tau, ascent=ascent))
        torch.testing.assert_close(rest, torch.tensor(x), rtol=0, atol=0, equal_nan=True)
    by_row = torch.tensor(run_project(x, tau, rows=True))
    torch.testing.assert_close(by_row, torch.tensor([[3.0, NAN], [-1.0, 1.0]]), rtol=0, atol=0, equal_nan=True)
    # And onto takes no component of it.
    assert np.isnan(run_project(x, tau, "onto")).all()
    assert np.isnan(run_project(x, tau, "onto", rows=True)).tolist() == [[True, True], [False, False]]


COMBINATIONS = [
    dict(zip(("method", "project", "project_over", "project_on"), values, strict=True))
    for values in itertools.product(METHODS, ("conflict", "onto"), ("tensor", "rows"), ("gradient", "update"))
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=joined)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_combination_equals_an_independent_calculation(options, dtype):
    options = options | ({} if options["method"] == "onproj" else {"reserve_rate": 0.3})
    options |= {"project_strength": 0.75} if options["project"] == "onto" else {}
    # Mid-run: in Adam's first step every |u| is lr, and rounding would choose the top.
    theta, m, root, tau = (draw((12, 25), scale, seed) for seed, scale in enumerate((1.0, 0.1, 0.1, 1e-2)))
    v = root.square()
    tau[3] = 0.0
    expected = reference.Run(*(x.numpy() for x in (theta, m, v)), 4, tau.numpy(), "w", **HYPER, **options)
    param = parameter(theta, dtype)
    optimizer = optimizer_of(param, tau.to(dtype), **options)
    optimizer.state[param].update(step=torch.tensor(4.0), exp_avg=m.to(dtype), exp_avg_sq=v.to(dtype))
    changed, of_numpy = [], expected.projected

    def watched(x, on):
        result = of_numpy(x, on)
        changed.append(not np.array_equal(result, x))
        return result

    expected.projected = watched
    for step, sign in enumerate((1, -1, 1, -1)):
        # Now along tau and now against it.
        g = draw(theta.shape, seed=10 + step) + 100 * sign * tau
        expected.step(g.numpy())
        param.grad = g.to(dtype)
        optimizer.step()
    assert any(changed)
    state = optimizer.state[param]
    for ours, theirs in ((param, expected.theta), (state["exp_avg"], expected.m), (state["exp_avg_sq"], expected.v)):
        assert_near(ours, theirs)


@pytest.fixture
def delta():
    return delta_of({"a": draw((9, 8)), "b": draw((5, 6))})


def weights(delta):
    return [(name, nn.Parameter(torch.ones(delta.shape(name)))) for name in delta.names]


@pytest.mark.parametrize(
    ("cls", "options"),
    [(fm.OnDAREAdamW, {"project": "conflict"}), (fm.OnDAREAdamW, {"project": "onto"}), (fm.OnProjAdamW, {})],
)
def test_a_sparse_file_cannot_be_projected_onto(cls, options, delta, tmp_path):
    path = delta.save(tmp_path / "sparse.safetensors", reserve_rate=0.5, method="random")
    optimizer = cls(weights(delta), reference_delta=path, **options)
    optimizer.param_groups[0].update({} if cls is fm.OnProjAdamW else {"reserve_rate": 0.5})
    how = options.get("project", "conflict")
    with pytest.raises(
        ValueError, match=rf"project='{how}' needs the whole reference delta and .*sparse.safetensors holds a sparse"
    ):
        optimizer.bind()


@pytest.mark.parametrize(("rate", "megabytes"), [(0.5, "0.000408"), (1.0, None)])
def test_what_a_second_dense_delta_costs_is_logged(rate, megabytes, delta, caplog):
    optimizer = fm.OnDAREAdamW(weights(delta), reference_delta=delta, project="conflict", reserve_rate=rate, alpha=0.0)
    with caplog.at_level(logging.INFO, logger="fused_merge"):
        optimizer.bind()
    # 9 * 8 + 5 * 6 = 102 elements of 4 bytes.
    expected = [f"projection keeps the dense reference delta in memory: {megabytes} MB"] if megabytes else []
    assert [record.message for record in caplog.records] == expected
