"""Merges at every K-th step: by hand, against numpy, against plain AdamW between them, and across a resume."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from bits import assert_same_bits
from one_tensor import ADAMW, HYPER, assert_near, draw, joined, optimizer_of, parameter, run, states

from fused_merge.eager.rounding import join

THETA, TAU = draw(300, dtype=torch.float64), draw(300, 1e-2, 1, torch.float64)


def torch_adamw(param):
    return torch.optim.AdamW([param], **ADAMW)


def test_two_steps_and_one_merge_by_hand():
    # Betas and eps 0: u = -lr * sign(g). lr = wd = 0.5: decay 0.75.
    param = parameter([1.0, 2.0, -4.0])
    optimizer = optimizer_of(
        param, [4.0, 0.0, 8.0], lr=0.5, betas=(0.0, 0.0), eps=0.0, weight_decay=0.5, alpha=0.25, reserve_rate=1.0,
        merge_every=2,
    )  # fmt: skip
    state = optimizer.state[param]
    param.grad = torch.tensor([1.0, -1.0, 1.0])
    optimizer.step()
    # 0.75 * theta + u: 0.75 - 0.5, 1.5 + 0.5, -3 - 0.5.
    assert param.tolist() == [0.25, 2.0, -3.5]
    assert state["anchor"].tolist() == [1.0, 2.0, -4.0]
    assert state["anchor_decay"].item() == 0.75
    param.grad = torch.tensor([1.0, 1.0, -1.0])
    optimizer.step()
    # c = 0.5625, c*anchor = (0.5625, 1.125, -2.25); u = 0.75*u_1 + u_2 = (-0.875, -0.125, 0.125), none of it decay;
    # then c*anchor + 0.75*u + 0.25*tau.
    merged = [0.5625 - 0.65625 + 1.0, 1.125 - 0.09375, -2.25 + 0.09375 + 2.0]
    assert param.tolist() == merged == [0.90625, 1.03125, -0.15625]
    assert state["anchor"].tolist() == merged
    assert state["anchor_decay"].item() == 1.0


ROWS = [
    {"method": "ondare", "reserve_rate": 0.3},
    {"method": "ondare", "reserve_rate": 0.3, "rescale": False},
    {"method": "ondare", "reserve_rate": 1.0},
    {"method": "onties", "reserve_rate": 0.3},
    {"method": "onties", "reserve_rate": 0.3, "vote": "paper"},
    {"method": "onties", "reserve_rate": 1.0},
    {"method": "onproj", "project": "conflict", "project_on": "update", "project_over": "rows"},
    {"method": "onsoft", "reserve_rate": 0.3},
]


@pytest.mark.parametrize("options", ROWS, ids=joined)
@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_equals_an_independent_calculation(options, every, dtype):
    # Mid-run: in Adam's first step every |u| is lr, and rounding would choose the top. 3 is no multiple of 2.
    theta, tau, m, root = (draw((15, 20), scale, seed) for seed, scale in enumerate((1.0, 1e-2, 0.1, 0.1)))
    v = root.square()
    param = parameter(theta, dtype)
    optimizer = optimizer_of(param, tau, merge_every=every, **options)
    optimizer.state[param].update(step=torch.tensor(3.0), exp_avg=m.to(dtype), exp_avg_sq=v.to(dtype))
    arrays = (x.numpy() for x in (theta, m, v))
    expected = reference.Run(*arrays, 3, tau.numpy(), "w", merge_every=every, **HYPER, **options)
    for step in range(8):
        g = draw(theta.shape, seed=1000 + step)
        param.grad = g.to(dtype)
        expected.step(g.numpy())
        optimizer.step()
    ours = states(optimizer)
    assert_near(param, expected.theta)
    assert_near(ours["exp_avg"], expected.m)
    assert_near(ours["exp_avg_sq"], expected.v)
    if every > 1:
        assert_near(ours["anchor"], expected.anchor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_between_merges_it_is_plain_adamw_bit_for_bit(dtype):
    param, other = parameter(THETA, dtype), parameter(THETA, dtype)
    ours = optimizer_of(param, TAU, merge_every=4, reserve_rate=0.5)
    # The same class where it has nothing to merge.
    theirs = optimizer_of(other, {"other": torch.ones(1)}, missing="plain", merge_every=4)
    theirs.add_param_group({"params": [("other", parameter([1.0]))]})
    for step in range(7):
        run(ours, 1, step)
        run(theirs, 1, step)
        if step == 3:
            # A merge changes the weights and not how AdamW goes on from them.
            assert not torch.equal(param, other)
            other.detach().copy_(param.detach())
        # What is never merged has no anchor.
        assert set(states(theirs)) == {"param", "step", "exp_avg", "exp_avg_sq"}
        assert_same_bits({key: states(ours)[key] for key in states(theirs)}, states(theirs))


def test_without_a_merge_in_the_run_it_is_torch_adamw():
    param, other = parameter(THETA), parameter(THETA)
    run(optimizer_of(param, TAU, merge_every=100), 20)
    run(torch_adamw(other), 20)
    assert_near(param, other.detach().numpy())


@pytest.mark.parametrize("options", [ROWS[0], ROWS[3], ROWS[4]], ids=joined)
def test_one_merge_at_the_end_is_a_merge_of_two_models(options):
    steps = 12
    param, other = parameter(THETA, torch.float64), parameter(THETA, torch.float64)
    run(optimizer_of(param, TAU, merge_every=steps, **options), steps)
    run(torch_adamw(other), steps)
    # Offline: from the decayed start to the end of plain AdamW, sparsified once and merged with F(tau).
    start = (1 - HYPER["lr"] * HYPER["weight_decay"]) ** steps * THETA.numpy()
    u, full, p = other.detach().numpy() - start, TAU.numpy(), options["reserve_rate"]
    if options["method"] == "ondare":
        kept_u = np.where(reference.keep(300, p, 0, steps, "w", 0), u, 0) / p
        kept_tau = np.where(reference.keep(300, p, 0, 0, "w", 1), full, 0) / p
    else:
        kept_u, kept_tau = (np.where(reference.top(x, p), x, 0) for x in (u, full))
    consensus = options.get("vote", "reference") if options["method"] == "onties" else "linear"
    assert_near(param, start + reference.merged(kept_u, kept_tau, 1 - HYPER["alpha"], HYPER["alpha"], consensus))


def test_the_delta_is_added_once_a_merge():
    # Without gradients u is 0, and without decay nothing else moves.
    param = parameter([1.0, 2.0])
    optimizer = optimizer_of(param, [0.5, -1.0], alpha=0.25, weight_decay=0.0, reserve_rate=1.0, merge_every=3)
    for step in range(1, 11):
        param.grad = torch.zeros(2)
        optimizer.step()
        merges = step // 3
        assert param.tolist() == [1.0 + merges * 0.125, 2.0 - merges * 0.25]


@pytest.mark.parametrize("method", ["ondare", "onties", "onsoft"])
def test_a_merge_at_lr_zero_is_skipped_and_the_next_takes_both_windows(method):
    param, zeros = parameter(THETA, torch.float64), np.zeros(300)
    options = {"method": method, "merge_every": 3, "reserve_rate": 0.5}
    optimizer = optimizer_of(param, TAU, **options)
    expected = reference.Run(THETA.numpy(), zeros, zeros, 0, TAU.numpy(), "w", **HYPER, **options)
    state = optimizer.state[param]
    for step, lr in enumerate((1e-2, 2e-2, 0.0, 1e-2, 1e-2, 3e-2), start=1):
        optimizer.param_groups[0]["lr"] = expected.o["lr"] = lr
        before = param.detach().clone()
        param.grad = draw(300, seed=step, dtype=torch.float64)
        expected.step(param.grad.numpy())
        optimizer.step()
        if lr == 0:
            assert torch.equal(param, before)
        if step < 6:
            assert torch.equal(state["anchor"], THETA)
            assert abs(state["anchor_decay"].item() - expected.since) < 1e-15
    assert torch.equal(state["anchor"], param)
    assert state["anchor_decay"] == 1.0
    assert_near(param, expected.theta)


def test_an_overflow_at_a_merge_moves_nothing_and_the_merge_comes_next():
    ours, without = (optimizer_of(parameter(THETA), TAU, merge_every=3) for _ in range(2))
    run(ours, 2)
    run(without, 3)
    ours.found_inf = torch.tensor(1.0)
    before = {key: value.clone() for key, value in states(ours).items()}
    run(ours, 1, 99)
    assert_same_bits(states(ours), before)
    ours.found_inf = torch.tensor(0.0)
    run(ours, 1, 2)
    assert_same_bits(states(ours), states(without))


STORAGE = [
    (torch.float32, "none", {"anchor": torch.float32}),
    (torch.float64, "none", dict.fromkeys(("anchor", "anchor_decay", "exp_avg", "exp_avg_sq"), torch.float64)),
    (torch.bfloat16, "none", {"anchor": torch.bfloat16}),
    (torch.float16, "none", {"anchor": torch.float16}),
    (torch.bfloat16, "fp32", {"anchor": torch.float32, "master": torch.float32}),
    (torch.float16, "fp32", {"anchor": torch.float32, "master": torch.float32}),
    (torch.bfloat16, "split", {"anchor": torch.float32, "master_low": torch.int16}),
]


@pytest.mark.parametrize(("dtype", "master", "special"), STORAGE, ids=str)
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("method", ["ondare", "onties"])
def test_states_are_there_only_where_they_are_used(method, dtype, master, special, every):
    param = parameter(draw((4, 5)), dtype)
    optimizer = optimizer_of(param, draw((4, 5), 1e-2, 1), method, master=master, merge_every=every)
    run(optimizer, 2)
    assert param.dtype == dtype
    expected = dict.fromkeys(("step", "exp_avg", "exp_avg_sq", "anchor_decay"), torch.float32) | special
    if every == 1:
        del expected["anchor"], expected["anchor_decay"]
    state = optimizer.state[param]
    assert {key: value.dtype for key, value in state.items()} == expected
    scalars = {"step", "anchor_decay"}
    assert all(value.shape == (() if key in scalars else (4, 5)) for key, value in state.items())


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_with_a_master_bf16_weights_merge_as_fp32_weights_do(master):
    runs = {}
    for dtype, kind in ((torch.float32, "none"), (torch.bfloat16, master)):
        param = parameter(THETA.bfloat16(), dtype)
        optimizer = optimizer_of(param, TAU.float(), merge_every=3, reserve_rate=0.5, master=kind)
        for step in range(7):
            param.grad = draw(300, seed=step).bfloat16().to(dtype)
            optimizer.step()
        runs[kind] = param.detach(), optimizer.state[param]
    (exact, exact_state), (weight, state) = runs.values()
    assert torch.equal(state["master"] if master == "fp32" else join(weight, state["master_low"]), exact)
    assert torch.equal(state["anchor"], exact_state["anchor"])
    assert not torch.equal(state["anchor"], state["anchor"].bfloat16().float())


@pytest.mark.parametrize(("dtype", "master"), [entry[:2] for entry in STORAGE], ids=str)
def test_a_run_resumed_between_merges_is_the_same_run(dtype, master, tmp_path):
    options = {"merge_every": 4, "master": master, "reserve_rate": 0.5}
    straight, first = (optimizer_of(parameter(THETA, dtype), TAU, **options) for _ in range(2))
    run(straight, 10)
    run(first, 6)
    torch.save((states(first)["param"], first.state_dict()), tmp_path / "checkpoint.pt")
    weights, saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = optimizer_of(parameter(weights, dtype), TAU, **options)
    resumed.load_state_dict(saved)
    assert_same_bits(states(first), states(resumed))
    run(resumed, 4, 6)
    assert_same_bits(states(straight), states(resumed))


def test_a_state_of_torch_adamw_begins_its_window_where_it_is_loaded():
    param, other = parameter(THETA, torch.float64), parameter(THETA, torch.float64)
    adamw = torch_adamw(other)
    run(adamw, 3)
    options = {"method": "ondare", "merge_every": 5, "reserve_rate": 0.5}
    optimizer = optimizer_of(param, TAU, **options)
    optimizer.load_state_dict(adamw.state_dict())
    param.detach().copy_(other.detach())
    assert optimizer.param_groups[0]["merge_every"] == 5
    theta, m, v = (states(adamw)[key].numpy() for key in ("param", "exp_avg", "exp_avg_sq"))
    expected = reference.Run(theta, m, v, 3, TAU.numpy(), "w", **HYPER, **options)
    for step in range(3, 10):
        run(optimizer, 1, step)
        expected.step(param.grad.numpy())
        assert_near(param, expected.theta)
    assert torch.equal(optimizer.state[param]["anchor"], param)


def test_the_window_is_fixed_once_a_step_is_taken():
    param = parameter(THETA)
    optimizer = optimizer_of(param, TAU, merge_every=4)
    optimizer.param_groups[0]["merge_every"] = 3
    run(optimizer, 1)
    optimizer.param_groups[0]["merge_every"] = 2
    before = param.detach().clone()
    with pytest.raises(ValueError, match="merge_every of a group is fixed once it has taken a step: it was 3 and is 2"):
        run(optimizer, 1)
    assert torch.equal(param, before)
