"""Searches for ratios with a given mean, on problems whose optimum is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quadratic import optimum

from fused_merge.adapt.search import CovarianceSearch, ProjectedAdam, SigmoidAdam, project_ratios


def run(search, curvature, target, steps):
    for _ in range(steps):
        ratios = search.propose()
        assert abs(ratios.mean() - search._mean) < 1e-9
        assert ((ratios >= 0) & (ratios <= 1)).all()
        loss = float(np.sum(curvature * (ratios - target) ** 2))
        search.learn(loss, 2 * curvature * (ratios - target))
    return search.best()


def problem(parts, condition, seed):
    rng = np.random.default_rng(seed)
    return np.exp(rng.uniform(0, np.log(condition), parts)), rng.uniform(-0.3, 1.3, parts)


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=6),
    st.floats(0, 1),
    st.lists(st.floats(0.1, 10), min_size=6, max_size=6),
    st.integers(0, 99),
)
def test_no_other_point_of_the_set_is_nearer(x, mean, metric, seed):
    x, metric = np.array(x), np.array(metric[: len(x)])
    found = project_ratios(x, mean, metric)
    assert abs(found.mean() - mean) < 1e-9
    assert ((found >= 0) & (found <= 1)).all()
    rng = np.random.default_rng(seed)
    for scale in (1.0, 0.1, 0.01):
        other = project_ratios(found + scale * rng.normal(size=len(x)), mean)
        assert np.sum(metric * (found - x) ** 2) <= np.sum(metric * (other - x) ** 2) + 1e-9


@pytest.mark.parametrize("parts", [2, 6, 24])
@pytest.mark.parametrize("condition", [1, 100])
@pytest.mark.parametrize("mean", [0.05, 0.4, 0.8])
def test_adam_finds_the_optimum(parts, condition, mean):
    curvature, target = problem(parts, condition, seed=parts + condition)
    search = ProjectedAdam(np.full(parts, mean), mean, 0.05, (0.9, 0.99), 300)
    assert np.abs(run(search, curvature, target, 300) - optimum(curvature, target, mean)).max() < 1e-3


def test_adam_in_noise_comes_near_the_optimum():
    curvature, target = problem(3, 10, seed=0)
    rng = np.random.default_rng(1)
    search = ProjectedAdam(np.full(3, 0.4), 0.4, 0.05, (0.9, 0.99), 400)
    for _ in range(400):
        noise = rng.normal(size=3)
        search.learn(0.0, 2 * curvature * (search.propose() - target) + noise)
    assert np.abs(search.best() - optimum(curvature, target, 0.4)).max() < 0.05


def test_the_mean_is_exact_however_coarse_numbers_are_there():
    # Neighbors of 1e9 are 1e-7 apart.
    found = project_ratios(np.array([1e9, 1e9 + 0.3, -5.0, 1e9 + 0.1]), 0.4)
    assert found.mean() == pytest.approx(0.4, abs=1e-15)
    assert found[2] == 0.0


@pytest.mark.parametrize(
    ("kind", "start", "gradient", "expected"),
    [
        # As long as the rate; a gradient that all parts have in common, or none, moves nothing.
        (ProjectedAdam, [0.3, 0.5], [2.0, -2.0], [0.25, 0.55]),
        (ProjectedAdam, [0.1, 0.7], [3.0, 3.0], [0.1, 0.7]),
        (SigmoidAdam, [0.0, 0.0], [0.0, 0.0], [0.4, 0.4]),
    ],
)
def test_the_first_step(kind, start, gradient, expected):
    search = kind(np.array(start), 0.4, 0.05, (0.9, 0.99), 10)
    search.learn(0.0, np.array(gradient))
    assert search.best() == pytest.approx(expected, abs=1e-12)


def test_what_all_parts_have_in_common_moves_nothing():
    one, other = (ProjectedAdam(np.full(3, 0.4), 0.4, 0.05, (0.9, 0.99), 10) for _ in range(2))
    for gradient in np.random.default_rng(0).normal(size=(5, 3)):
        one.learn(0.0, gradient)
        other.learn(0.0, gradient + 100.0)
        assert one.best() == pytest.approx(other.best(), abs=1e-9)


def test_sigmoids_reach_an_optimum_inside():
    curvature, target = np.array([1.0, 2.0, 4.0]), np.array([0.2, 0.5, 0.6])
    search = SigmoidAdam(np.zeros(3), 0.4, 0.2, (0.9, 0.99), 400)
    assert np.abs(run(search, curvature, target, 400) - optimum(curvature, target, 0.4)).max() < 1e-3


def test_the_chain_rule_of_the_sigmoids():
    search = SigmoidAdam(np.zeros(3), 0.4, 0.1, (0.9, 0.99), 10)
    search._x = np.array([0.3, -0.2, 0.1])
    w, gradient = search._x.copy(), np.array([1.0, -2.0, 0.5])
    search.learn(0.0, gradient)
    by_w = search._momentum / (1 - 0.9)
    sides = []
    for step in (*1e-6 * np.eye(3), *-1e-6 * np.eye(3)):
        search._x = w + step
        sides.append(gradient @ search.propose())
    numeric = np.subtract(sides[:3], sides[3:]) / 2e-6
    assert by_w == pytest.approx(numeric, rel=1e-6)


def test_a_search_without_gradients_finds_the_optimum_and_depends_on_its_seed():
    curvature, target = problem(3, 10, seed=5)
    search, other = (CovarianceSearch(np.full(3, 0.4), 0.4, 0.1, seed) for seed in (0, 1))
    assert search.propose().tolist() != other.propose().tolist()
    assert np.abs(run(search, curvature, target, 400) - optimum(curvature, target, 0.4)).max() < 1e-2


@pytest.mark.parametrize(
    "make",
    [
        lambda: ProjectedAdam(np.full(3, 0.4), 0.4, 0.05, (0.9, 0.99), 50),
        lambda: SigmoidAdam(np.zeros(3), 0.4, 0.05, (0.9, 0.99), 50),
        lambda: CovarianceSearch(np.full(3, 0.4), 0.4, 0.1, seed=7),
    ],
)
def test_a_search_is_a_function_of_what_it_was_told(make):
    first, second = make(), make()
    rng = np.random.default_rng(0)
    for _ in range(30):
        loss, gradient = float(rng.normal()), rng.normal(size=3)
        assert first.propose().tolist() == second.propose().tolist()
        first.learn(loss, gradient)
        second.learn(loss, gradient)
    assert first.best().tolist() == second.best().tolist()
