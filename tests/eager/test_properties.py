"""What holds for every row, whatever the numbers: drawn by hypothesis, always the same draws."""

from __future__ import annotations

import pytest
import reference
import torch
from bits import assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from one_tensor import ADAMW, HYPER, assert_near, delta_of, draw, joined, of_every_method, optimizer_of, parameter
from torch import nn

import fused_merge as fm
from fused_merge.eager import adamw
from fused_merge.eager.projection import project
from fused_merge.eager.scalars import Hyper, derive_scalars

ROWS = [
    *of_every_method(0.4),
    {"method": "onties", "reserve_rate": 0.4, "vote": "paper"},
    {"method": "ondare", "reserve_rate": 0.4, "project": "onto", "project_over": "rows", "project_on": "update"},
    {"method": "onsoft", "reserve_rate": 0.4, "merge_every": 2},
]
SHAPES = st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**32)

few = settings(derandomize=True, deadline=None, max_examples=20)


def each(rows):
    return pytest.mark.parametrize("row", rows, ids=joined)


def taus_of(shapes, seed):
    return {f"layer.{i}": draw(shape, 1e-2, seed + 100 + i) for i, shape in enumerate(shapes)}


def weights_of(shapes, seed):
    return {f"layer.{i}": nn.Parameter(draw(shape, seed=seed + i)) for i, shape in enumerate(shapes)}


def run(weights, taus, seed, groups=None, steps=2, **options):
    """Step named weights; returns every bit of them and of their states."""
    groups = groups or [{"params": list(weights.items())}]
    optimizer = fm.MergingAdamW(groups, reference_delta=delta_of(taus), impl="eager", **HYPER | options)
    for step in range(steps):
        for i, name in enumerate(sorted(weights)):
            weights[name].grad = draw(weights[name].shape, seed=seed + 1000 * step + i)
        optimizer.step()
    return {name: {"param": param.detach(), **optimizer.state[param]} for name, param in weights.items()}


@each(ROWS)
@few
@given(shapes=SHAPES, seed=SEEDS, data=st.data())
def test_two_runs_are_equal_in_any_order_and_grouping(row, shapes, seed, data):
    names, ends = [f"layer.{i}" for i in range(len(shapes))], []
    shuffled = data.draw(st.permutations(names))
    cut = data.draw(st.integers(0, len(names) - 1))
    for order in ([names], [names], [shuffled[: cut + 1], shuffled[cut + 1 :]]):
        weights = weights_of(shapes, seed)
        groups = [{"params": [(name, weights[name]) for name in part]} for part in order if part]
        ends.append(run(weights, taus_of(shapes, seed), seed, groups, **row))
    assert_same_bits(ends[0], ends[1])
    assert_same_bits(ends[0], ends[2])


@each(ROWS)
@few
@given(shapes=SHAPES, seed=SEEDS)
def test_every_row_equals_an_independent_calculation(row, shapes, seed):
    # In fp64, and mid-run: what is top is then decided by more than rounding.
    for i, shape in enumerate(shapes):
        drawn = [draw(shape, scale, seed + j, torch.float64) for j, scale in enumerate((1.0, 0.1, 0.1, 1e-2))]
        theta, m, root, tau = drawn
        v = root.square()
        name = f"layer.{i}"
        options = {"project": "conflict"} | row if row["method"] == "onproj" else row
        expected = reference.Run(*(x.numpy() for x in (theta, m, v)), 4, tau.numpy(), name, **HYPER, **options)
        param = parameter(theta, torch.float64)
        optimizer = optimizer_of(param, {name: tau}, name=name, **row)
        optimizer.state[param].update(step=torch.tensor(4.0), exp_avg=m, exp_avg_sq=v)
        for step in range(3):
            param.grad = draw(shape, seed=seed + 10 + step, dtype=torch.float64)
            expected.step(param.grad.numpy())
            optimizer.step()
        assert_near(param, expected.theta, 1e-12)


@pytest.mark.parametrize("row", [{"method": "ondare", "reserve_rate": 1.0}, {"method": "onproj"}], ids=str)
@pytest.mark.parametrize("every", [1, 2])
@few
@given(shapes=SHAPES, seed=SEEDS, steps=st.integers(1, 6))
def test_with_alpha_one_it_walks_along_tau(row, every, shapes, seed, steps):
    taus, weights = taus_of(shapes, seed), weights_of(shapes, seed)
    start = {name: param.detach().clone() for name, param in weights.items()}
    steps *= every
    run(weights, taus, seed, steps=steps, **row, alpha=1.0, weight_decay=0.0, merge_every=every)
    for name, param in weights.items():
        walked = (param.detach().double() - start[name]) - steps // every * taus[name].double()
        # A rounding of half a unit at each step, and of the plain steps between.
        size = float(start[name].abs().max()) + steps * 0.1
        assert walked.abs().max() <= steps * 2.0**-23 * size


# With the vote of the authors' code, tau decides what is kept of u even when alpha is 0.
@each([row for row in ROWS if row["method"] != "onties" or row.get("vote") == "paper"])
@few
@given(shapes=SHAPES, seed=SEEDS, power=st.integers(-8, 8))
def test_without_alpha_the_way_is_as_long_as_lr(row, shapes, seed, power):
    ends = []
    for factor in (1.0, 2.0**power):
        # From zero nothing is rounded on the way but what scales along.
        weights = {f"layer.{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}
        run(weights, taus_of(shapes, seed), seed, **row, alpha=0.0, weight_decay=0.0, lr=2.0**-7 * factor)
        ends.append({name: param.detach() / factor for name, param in weights.items()})
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("rows", [False, True])
@few
@given(rows_count=st.integers(1, 8), columns=st.integers(1, 200), seed=SEEDS, scale=st.floats(1e-6, 1e3))
def test_a_conflicting_update_never_survives(rows, rows_count, columns, seed, scale):
    tau, m, root = (draw((rows_count, columns), by, seed + i) for i, by in enumerate((1e-2, scale, scale)))
    v = root.square()
    u = adamw.update(m, v, derive_scalars(7.0, Hyper(1e-2, (0.9, 0.99), 1e-8, 0.0, 0.0)))
    conflict_free = project(u, tau, "conflict", strength=1.0, rows=rows, ascent=False).double()
    pairs = zip(conflict_free, u.double(), tau.double(), strict=True) if rows else [(conflict_free, u, tau.double())]
    for after, before, along in pairs:
        # What is set to zero is below 2^-20 of its terms.
        tiny = 2.0**-18 * before.double().norm() * along.norm()
        assert (after * along).sum() >= -tiny
        if (before.double() * along).sum() < -tiny:
            assert (after * along).sum() <= tiny


@pytest.mark.parametrize("over", ["tensor", "rows"])
@few
@given(rows=st.integers(1, 6), columns=st.integers(1, 40), seed=SEEDS)
def test_no_step_goes_against_tau(over, rows, columns, seed):
    tau, param = draw((rows, columns), 1e-2, seed), nn.Parameter(torch.zeros(rows, columns))
    options = {"project_over": over, "project_on": "update", "alpha": 0.0, "weight_decay": 0.0}
    optimizer = optimizer_of(param, tau, "onproj", **options)
    for step in range(4):
        before = param.detach().double()
        # Uphill along tau: every step wants to go against it.
        param.grad = tau / 1e-2 + draw((rows, columns), seed=seed + 1 + step)
        optimizer.step()
        moved, along = param.detach().double() - before, tau.double()
        dots, norms = (moved * along), moved.norm() * along.norm()
        dots = dots.sum() if over == "tensor" else dots.sum(1)
        # Rounding of the weights, which are below 0.1, comes on top.
        assert (dots >= -(2.0**-18) * norms - 2.0**-27 * along.norm() * (rows * columns) ** 0.5).all()


@each(
    [
        *of_every_method(1.0),
        {"method": "onties", "reserve_rate": 1.0, "vote": "paper"},
        {"method": "onties", "reserve_rate": 0.4},
        {"method": "onties", "reserve_rate": 0.4, "vote": "paper"},
        {"method": "onsoft", "reserve_rate": 0.4},
        {"method": "onproj", "project_on": "update", "project_over": "rows"},
        {"method": "ondare", "reserve_rate": 1.0, "merge_every": 2},
    ]
)
@few
@given(n=st.integers(1, 40), seed=SEEDS, data=st.data())
def test_a_nan_goes_where_it_goes_in_adamw(row, n, seed, data):
    where = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
    bad = torch.zeros(n, dtype=torch.bool)
    bad[list(where)] = True
    param, peer = (nn.Parameter(draw(n, seed=seed)) for _ in range(2))
    theirs = torch.optim.AdamW([peer], **ADAMW)
    ours = optimizer_of(param, draw(n, 1e-2, seed + 1), **row)
    for step in range(3):
        for p, optimizer in ((param, ours), (peer, theirs)):
            p.grad = torch.where(bad & (step == 1), torch.nan, draw(n, seed=seed + 2 + step))
            optimizer.step()
    for a, b in (
        (param, peer),
        *((ours.state[param][key], theirs.state[peer][key]) for key in ("exp_avg", "exp_avg_sq")),
    ):
        assert a.isnan().tolist() == b.isnan().tolist() == bad.tolist()


@few
@given(n=st.integers(1, 200), seed=SEEDS)
def test_a_random_drop_drops_a_nan_update_as_any_other(n, seed):
    param = nn.Parameter(draw(n, seed=seed))
    optimizer = optimizer_of(param, draw(n, seed=seed + 1), reserve_rate=0.4)
    param.grad = torch.full((n,), torch.nan)
    optimizer.step()
    assert param.isnan().tolist() == reference.keep(n, 0.4, 0, 1, "w", 0).tolist()
    assert optimizer.state[param]["exp_avg"].isnan().all()
