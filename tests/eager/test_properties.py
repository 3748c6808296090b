"""What holds for every row, whatever the numbers: drawn by hypothesis, always the same draws."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fused_merge as fm
from fused_merge import functional
from fused_merge.eager import adamw
from fused_merge.eager.projection import project
from fused_merge.eager.scalars import Hyper, derive_scalars
from fused_merge.methods import METHODS, merge_rule
from fused_merge.names import tensor_id

HYPER = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.05}
ROWS = [
    *({"method": method} | ({} if method == "onproj" else {"reserve_rate": 0.4}) for method in METHODS),
    {"method": "onties", "reserve_rate": 0.4, "vote": "paper"},
    {"method": "ondare", "reserve_rate": 0.4, "project": "onto", "project_over": "rows", "project_on": "update"},
    {"method": "onsoft", "reserve_rate": 0.4, "merge_every": 2},
]
SHAPES = st.lists(st.lists(st.integers(1, 6), max_size=3).map(tuple), min_size=1, max_size=3)
SEEDS = st.integers(0, 2**32)

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row.values())))
few = settings(derandomize=True, deadline=None, max_examples=20)


def draw(shape, seed, scale=1.0, dtype=torch.float32):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def weights_of(shapes, seed):
    return {f"layer.{i}": nn.Parameter(draw(shape, seed + i)) for i, shape in enumerate(shapes)}


def delta_of(shapes, seed, dtype=torch.float32):
    taus = {f"layer.{i}": draw(shape, seed + 100 + i, 1e-2, dtype) for i, shape in enumerate(shapes)}
    return fm.ReferenceDelta.from_models({name: torch.zeros_like(tau) for name, tau in taus.items()}, taus)


def run(weights, groups, delta, seed, steps=2, **options):
    optimizer = fm.MergingAdamW(groups, reference_delta=delta, impl="eager", **HYPER | options)
    for step in range(steps):
        for i, name in enumerate(sorted(weights)):
            weights[name].grad = draw(weights[name].shape, seed + 1000 * step + i)
        optimizer.step()
    return optimizer


def outputs(weights, optimizer):
    return {
        (name, key): value
        for name, param in weights.items()
        for key, value in ({"param": param.detach()} | optimizer.state[param]).items()
    }


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], rtol=0, atol=0)


@each_row
@few
@given(shapes=SHAPES, seed=SEEDS, data=st.data())
def test_two_runs_are_equal_in_any_order_and_grouping(row, shapes, seed, data):
    delta, ends = delta_of(shapes, seed), []
    names = [f"layer.{i}" for i in range(len(shapes))]
    shuffled = data.draw(st.permutations(names))
    cut = data.draw(st.integers(0, len(names) - 1))
    for order in ([names], [names], [shuffled[: cut + 1], shuffled[cut + 1 :]]):
        weights = weights_of(shapes, seed)
        groups = [{"params": [(name, weights[name]) for name in part]} for part in order if part]
        ends.append(outputs(weights, run(weights, groups, delta, seed, **row)))
    assert_same(ends[0], ends[1])
    assert_same(ends[0], ends[2])


@each_row
@few
@given(shapes=SHAPES, seed=SEEDS)
def test_every_row_equals_an_independent_calculation(row, shapes, seed):
    # In fp64, and mid-run: what is top is then decided by more than rounding.
    delta = delta_of(shapes, seed, torch.float64)
    for i, shape in enumerate(shapes):
        name = f"layer.{i}"
        theta, m, v = draw(shape, seed), draw(shape, seed + 1, 0.1), draw(shape, seed + 2, 0.1).square()
        tau = delta.tensor(name)
        options = {"project": "conflict"} | row if row["method"] == "onproj" else row
        expected = reference.Run(*(x.numpy() for x in (theta, m, v)), 4, tau.numpy(), name, **HYPER, **options)
        param = nn.Parameter(theta.double())
        optimizer = fm.MergingAdamW([(name, param)], reference_delta=delta, impl="eager", **HYPER, **row)
        optimizer.state[param].update(step=torch.tensor(4.0), exp_avg=m.double(), exp_avg_sq=v.double())
        for step in range(3):
            param.grad = draw(shape, seed + 10 + step, dtype=torch.float64)
            expected.step(param.grad.numpy())
            optimizer.step()
        ours = param.detach().numpy()
        assert np.abs(ours - expected.theta).max() <= 1e-12 * np.abs(expected.theta).max()


@pytest.mark.parametrize("row", [{"method": "ondare", "reserve_rate": 1.0}, {"method": "onproj"}], ids=str)
@pytest.mark.parametrize("every", [1, 2])
@few
@given(shapes=SHAPES, seed=SEEDS, steps=st.integers(1, 6))
def test_with_alpha_one_it_walks_along_tau(row, every, shapes, seed, steps):
    delta, weights = delta_of(shapes, seed), weights_of(shapes, seed)
    start = {name: param.detach().clone() for name, param in weights.items()}
    steps *= every
    run(
        weights, list(weights.items()), delta, seed, steps, **row | {"alpha": 1.0, "weight_decay": 0.0},
        merge_every=every,
    )  # fmt: skip
    for name, param in weights.items():
        walked = (param.detach().double() - start[name]) - steps // every * delta.tensor(name).double()
        # A rounding of half a unit at each step, and of the plain steps between.
        size = float(start[name].abs().max()) + steps * 0.1
        assert walked.abs().max() <= steps * 2.0**-23 * size


@pytest.mark.parametrize(
    "row",
    # With the vote of the authors' code, tau decides what is kept of u even when alpha is 0.
    [row for row in ROWS if row["method"] != "onties" or row.get("vote") == "paper"],
    ids=lambda row: "-".join(map(str, row.values())),
)
@few
@given(shapes=SHAPES, seed=SEEDS, power=st.integers(-8, 8))
def test_without_alpha_the_way_is_as_long_as_lr(row, shapes, seed, power):
    delta, ends = delta_of(shapes, seed), []
    for factor in (1.0, 2.0**power):
        # From zero nothing is rounded on the way but what scales along.
        weights = {f"layer.{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}
        options = row | {"alpha": 0.0, "weight_decay": 0.0, "lr": 2.0**-7 * factor}
        run(weights, list(weights.items()), delta, seed, **options)
        ends.append({name: param.detach() / factor for name, param in weights.items()})
    assert_same(*ends)


@pytest.mark.parametrize("rows", [False, True])
@few
@given(rows_count=st.integers(1, 8), columns=st.integers(1, 200), seed=SEEDS, scale=st.floats(1e-6, 1e3))
def test_a_conflicting_update_never_survives(rows, rows_count, columns, seed, scale):
    tau, m = draw((rows_count, columns), seed, 1e-2), draw((rows_count, columns), seed + 1, scale)
    v = draw((rows_count, columns), seed + 2, scale).square()
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
    tau, start = draw((rows, columns), seed, 1e-2), torch.zeros(rows, columns)
    param = nn.Parameter(start.clone())
    delta = fm.ReferenceDelta.from_models({"w": torch.zeros_like(tau)}, {"w": tau})
    optimizer = fm.OnProjAdamW(
        [("w", param)], reference_delta=delta, project_over=over, project_on="update", alpha=0.0, impl="eager",
        lr=1e-2,
    )  # fmt: skip
    for step in range(4):
        before = param.detach().double()
        # Uphill along tau: every step wants to go against it.
        param.grad = tau / 1e-2 + draw((rows, columns), seed + 1 + step)
        optimizer.step()
        moved, along = param.detach().double() - before, tau.double()
        dots, norms = (moved * along), moved.norm() * along.norm()
        dots = dots.sum() if over == "tensor" else dots.sum(1)
        # Rounding of the weights, which are below 0.1, comes on top.
        assert (dots >= -(2.0**-18) * norms - 2.0**-27 * along.norm() * (rows * columns) ** 0.5).all()


@pytest.mark.parametrize(
    "row",
    [
        *({"method": method} | ({} if method == "onproj" else {"reserve_rate": 1.0}) for method in METHODS),
        {"method": "onties", "reserve_rate": 1.0, "vote": "paper"},
        {"method": "onties", "reserve_rate": 0.4},
        {"method": "onties", "reserve_rate": 0.4, "vote": "paper"},
        {"method": "onsoft", "reserve_rate": 0.4},
        {"method": "onproj", "project_on": "update", "project_over": "rows"},
        {"method": "ondare", "reserve_rate": 1.0, "merge_every": 2},
    ],
    ids=lambda row: "-".join(map(str, row.values())),
)
@few
@given(n=st.integers(1, 40), seed=SEEDS, data=st.data())
def test_a_nan_goes_where_it_goes_in_adamw(row, n, seed, data):
    where = data.draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n))
    bad = torch.zeros(n, dtype=torch.bool)
    bad[list(where)] = True
    options = {key: HYPER[key] for key in ("lr", "betas", "eps", "weight_decay")}
    param, peer = (nn.Parameter(draw(n, seed)) for _ in range(2))
    theirs = torch.optim.AdamW([peer], **options)
    tau = draw(n, seed + 1, 1e-2)
    delta = fm.ReferenceDelta.from_models({"w": torch.zeros(n)}, {"w": tau})
    ours = fm.MergingAdamW([("w", param)], reference_delta=delta, impl="eager", **HYPER, **row)
    for step in range(3):
        for p, optimizer in ((param, ours), (peer, theirs)):
            p.grad = torch.where(bad & (step == 1), torch.nan, draw(n, seed + 2 + step))
            optimizer.step()
    for a, b in (
        (param, peer),
        *((ours.state[param][key], theirs.state[peer][key]) for key in ("exp_avg", "exp_avg_sq")),
    ):
        assert a.isnan().tolist() == b.isnan().tolist() == bad.tolist()


@few
@given(n=st.integers(1, 200), seed=SEEDS)
def test_a_random_drop_drops_a_nan_update_as_any_other(n, seed):
    param = nn.Parameter(draw(n, seed))
    delta = fm.ReferenceDelta.from_models({"w": torch.zeros(n)}, {"w": draw(n, seed + 1)})
    optimizer = fm.OnDAREAdamW([("w", param)], reference_delta=delta, impl="eager", **HYPER, reserve_rate=0.4)
    param.grad = torch.full((n,), torch.nan)
    optimizer.step()
    assert param.isnan().tolist() == reference.keep(n, 0.4, 0, 1, "w", 0).tolist()
    assert optimizer.state[param]["exp_avg"].isnan().all()


def test_masks_of_steps_tensors_and_domains_are_independent():
    """As the weights show them: what has moved was kept."""
    n, rate, names = 50_000, 0.1, ["a", "b"]
    rule, masks = merge_rule("ondare", rate), []
    kept_taus = [
        fm.ReferenceDelta.from_models({name: torch.zeros(n)}, {name: torch.ones(n)}).sparse(
            name, fm.reference_delta.Sparsity("random", rate, 0)
        )
        for name in names
    ]
    for alpha, steps in ((0.0, 3), (1.0, 1)):
        params, states = [torch.zeros(n) for _ in names], [torch.zeros(2, n) for _ in names]
        counts = [torch.zeros(()) for _ in names]
        for _ in range(steps):
            before = [param.clone() for param in params]
            functional.merging_adamw_(
                params, [torch.ones(n) for _ in names], [state[0] for state in states], [state[1] for state in states],
                counts, kept_taus, rule=rule, hyper=Hyper(**HYPER | {"alpha": alpha}),
                tensor_ids=[tensor_id(name) for name in names], impl="eager",
            )  # fmt: skip
            # Decay moves what was kept before by a thousandth; a merge moves by lr / p or more.
            masks += [(new - old).abs() > 0.01 for new, old in zip(params, before, strict=True)]
    assert len(masks) == 8
    deviation = (n * rate * (1 - rate)) ** 0.5
    for mask in masks:
        assert abs(int(mask.sum()) - n * rate) < 5 * deviation
    for a, b in itertools.combinations(masks, 2):
        assert abs(int((a & b).sum()) - n * rate**2) < 5 * (n * rate**2) ** 0.5
