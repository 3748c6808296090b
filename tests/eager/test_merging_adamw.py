"""The step by hand, and where it merges nothing against torch; `test_step_k` has every method against numpy."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits, same_bits
from device import DEVICE
from one_tensor import assert_near
from tensors import HYPER, Tensors

EXACT = {"betas": (0.0, 0.0), "weight_decay": 0.0}


def first_step(param, grad, tau, **options):
    """A first step of one tensor by the eager code."""
    t = Tensors((len(param),))
    t.start()
    t.params, t.grads, t.taus = ([torch.tensor(x, device=DEVICE)] for x in (param, grad, tau))
    t.step("eager", **options)
    return t


def test_one_merged_step_by_hand():
    # b1 = b2 = 0, eps = 0: u = -lr * sign(g). lr = 0.5, wd = 0.5, alpha = 0.25, p = 1.
    options = EXACT | {"lr": 0.5, "eps": 0.0, "weight_decay": 0.5, "alpha": 0.25, "reserve_rate": 1.0}
    t = first_step([1.0, 2.0, -4.0], [3.0, -2.0, 1.0], [4.0, 0.0, 8.0], **options)
    # theta * 0.75 + 0.75 * u + 0.25 * tau with u = (-0.5, +0.5, -0.5)
    assert t.params[0].tolist() == [0.75 - 0.375 + 1.0, 1.5 + 0.375, -3.0 - 0.375 + 2.0]
    assert t.exp_avgs[0].tolist() == [3.0, -2.0, 1.0]
    assert t.exp_avg_sqs[0].tolist() == [9.0, 4.0, 1.0]
    assert t.steps[0].item() == 1.0


def test_one_onties_step_by_hand():
    # With eps so large that it is the denominator: u = -g * lr / eps = -g.
    options = EXACT | {"method": "onties", "lr": 2.0**40, "eps": 2.0**40, "alpha": 0.5, "reserve_rate": 0.5}
    t = first_step([0.0] * 4, [4.0, -3.0, 2.0, 1.0], [8.0] * 4, **options)
    # F(u) = (-4, 3, 0, 0); votes: 4, 11, 8, 8 all +: u of the first is dropped.
    assert t.params[0].tolist() == [4.0, 5.5, 4.0, 4.0]


def beside_torch(t, dtypes, eps=1e-8):
    """Step 20 times without merging anything, and torch's AdamW likewise in each dtype; returns the latter."""
    t.start()
    peers = [[torch.nn.Parameter(p.to(dtype, copy=True)) for p in t.params] for dtype in dtypes]
    options = {"lr": 1e-2, "betas": HYPER["betas"], "eps": eps, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW(params, **options) for params in peers]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        t.grads = [torch.randn(p.shape, generator=generator).to(p) for p in t.params]
        for params, optimizer in zip(peers, optimizers, strict=True):
            for p, g in zip(params, t.grads, strict=True):
                p.grad = g.to(p.dtype, copy=True)
            optimizer.step()
        t.step("eager", alpha=0.0, reserve_rate=1.0, eps=eps)
    return optimizers


def test_without_merging_it_is_torch_adamw():
    t = Tensors((300,), (17, 31), (2, 3, 5))
    (peer,) = beside_torch(t, [torch.float32])
    for i, p in enumerate(peer.param_groups[0]["params"]):
        theirs = peer.state[p] | {"param": p.detach()}
        for ours, key in ((t.params, "param"), (t.exp_avgs, "exp_avg"), (t.exp_avg_sqs, "exp_avg_sq")):
            assert_near(ours[i], theirs[key].double().cpu().numpy())
        assert t.steps[i] == theirs["step"] == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_low_precision_it_is_no_worse_than_torch_adamw(dtype):
    t = Tensors((300,), (17, 31), dtype=dtype)
    runs = [optimizer.param_groups[0]["params"] for optimizer in beside_torch(t, [dtype, torch.float64], eps=1e-6)]
    for ours, theirs, exact in zip(t.params, *runs, strict=True):
        our_error, their_error = ((x.double() - exact).abs() for x in (ours, theirs))
        assert our_error.max() <= their_error.max()
        assert our_error.mean() <= their_error.mean()


def test_a_tensor_without_a_delta_steps_as_adamw():
    t = Tensors((500,), tau=None)
    plain = t.clone()
    plain.taus = [torch.zeros(500, device=DEVICE)]
    t.step("eager")
    plain.step("eager", alpha=0.0, reserve_rate=1.0)
    assert_same_bits(t.outputs(), plain.outputs())


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_at_lr_zero_the_moments_move_and_the_weights_do_not(lr, dtype):
    t = Tensors((1000,), dtype=dtype)
    t.params[0][:3] = torch.tensor([-0.0, torch.inf, torch.nan])
    before = t.clone()
    t.step("eager", lr=lr)
    assert same_bits(t.params[0], before.params[0])
    assert not torch.equal(t.exp_avgs[0], before.exp_avgs[0])
    assert not torch.equal(t.exp_avg_sqs[0], before.exp_avg_sqs[0])
    assert t.steps[0] == before.steps[0] + 1


def test_a_tensor_learning_rate_is_the_float():
    t = Tensors((1000,))
    other = t.clone()
    t.step("eager", lr=torch.tensor(0.01, dtype=torch.float64))
    other.step("eager", lr=0.01)
    assert_same_bits(t.outputs(), other.outputs())
