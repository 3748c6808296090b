"""What gradients are multiplied by: GradScaler's scale and its overflows, and clipping."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from bits import assert_same_bits
from device import DEVICE
from models import IMPLS, assert_same, fill_gradients, run, snapshot, trained, training
from torch import nn

import fused_merge as fm


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("unscaled_first", [False, True], ids=["scaled", "unscale_"])
def test_a_scaled_run_is_the_unscaled_run(unscaled_first, impl, delta):
    """A power of two changes no digit: bit for bit."""
    (model, plain), (scaled, optimizer) = (training(delta, impl=impl) for _ in range(2))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12, growth_interval=1)
    for step in range(2):
        run(plain, model, 1, first=step)
        fill_gradients(scaled, step)
        scale = scaler.scale(torch.ones((), device=DEVICE))
        for p in scaled.parameters():
            p.grad.mul_(scale)
        if unscaled_first:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**14
    assert_same(plain, optimizer)
    assert not hasattr(optimizer, "grad_scale")


def test_a_scale_that_is_no_power_of_two_is_taken_out_up_to_rounding(delta):
    (model, plain), (scaled, optimizer) = (training(delta) for _ in range(2))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1000.0)
    for step in range(3):
        run(plain, model, 1, first=step)
        fill_gradients(scaled, step)
        for p in scaled.parameters():
            p.grad.mul_(scaler.scale(torch.ones((), device=DEVICE)))
        scaler.step(optimizer)
        scaler.update()
    for p, q in zip(model.parameters(), scaled.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6 * p.abs().max()
        for key in ("exp_avg", "exp_avg_sq"):
            ours, theirs = optimizer.state[q][key], plain.state[p][key]
            assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()


@pytest.mark.parametrize(
    ("impl", "max_norm", "scale"),
    [*(("eager", norm, scale) for norm in (0.1, 1e3) for scale in (None, 2.0**10)), ("triton", 0.1, 2.0**10)],
)
def test_clipping_is_that_of_torch(scale, max_norm, impl, delta):
    """Over two groups, of which the gradients are not rewritten."""
    model, peer = trained(), trained()

    def of(model, **options):
        named = list(model.named_parameters())
        groups = [{"params": named[:2]}, {"params": named[2:], "lr": 3e-2}]
        options |= {"lr": 1e-2, "reserve_rate": 0.5, "impl": impl}
        return fm.OnDAREAdamW(groups, reference_delta=delta, **options)

    ours, theirs = of(model, max_grad_norm=max_norm), of(peer)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=scale or 1.0, enabled=scale is not None)
    factor = scaler.scale(torch.ones((), device=DEVICE))
    assert ours.grad_norm is None
    for step in range(3):
        fill_gradients(model, step)
        fill_gradients(peer, step)
        norm = nn.utils.clip_grad_norm_(peer.parameters(), max_norm)
        for p in model.parameters():
            p.grad.mul_(factor)
        grads = [p.grad.clone() for p in model.parameters()]
        scaler.step(ours)
        theirs.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
        assert ours.grad_norm.shape == ()
        assert ours.grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
        scaler.update()
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6 * q.abs().max()
        assert (ours.state[p]["exp_avg"] - theirs.state[q]["exp_avg"]).abs().max() <= 1e-6 * max_norm
    assert theirs.grad_norm is None


def test_a_group_that_does_not_clip_is_not_clipped_by_the_others(delta):
    """The norm is of all gradients, and each group has its own bound. A hand-worked example: |(3, 4)| = 5."""
    base = {"a": torch.zeros(1), "b": torch.zeros(1)}
    parameters = {name: nn.Parameter(torch.zeros(1, device=DEVICE)) for name in base}
    groups = [{"params": [("a", parameters["a"])], "max_grad_norm": 1.0}, {"params": [("b", parameters["b"])]}]
    optimizer = fm.OnDAREAdamW(
        groups, reference_delta=fm.ReferenceDelta.from_models(base, base), lr=1.0, betas=(0.0, 0.0)
    )
    parameters["a"].grad = torch.full_like(parameters["a"], 3.0)
    parameters["b"].grad = torch.full_like(parameters["b"], -4.0)
    optimizer.step()
    assert optimizer.grad_norm == 5
    assert optimizer.grad_norm.dtype == torch.float64
    assert optimizer.state[parameters["a"]]["exp_avg"].item() == pytest.approx(0.6, rel=1e-6)
    assert optimizer.state[parameters["b"]]["exp_avg"].item() == -4
    # Nobody clips, and nothing is measured.
    optimizer.param_groups[0]["max_grad_norm"] = None
    optimizer.step()
    assert optimizer.grad_norm is None


def test_a_step_in_which_nothing_has_a_gradient_warns_once(delta, caplog):
    """As where TRL wraps the model for its peft_config: the optimizer holds the frozen base weights."""
    model, optimizer = training(delta)
    before = snapshot(optimizer)
    model.requires_grad_(False)
    with caplog.at_level(logging.WARNING, "fused_merge"):
        for _ in range(3):
            optimizer.step()
        twin = copy.deepcopy(optimizer)
        twin.step()
    (message,) = [record.message for record in caplog.records]
    assert message.startswith(
        "no parameter of this optimizer has a gradient, and the step changed nothing; if another "
    )
    assert message.endswith("make the optimizer of the model that is trained, for example through fm.optimizer_factory")
    assert_same_bits(snapshot(optimizer), before)


def test_a_step_in_which_anything_has_a_gradient_does_not_warn(delta, caplog):
    model, optimizer = training(delta)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    empty = fm.OnDAREAdamW([{"params": [], "param_names": []}], reference_delta=delta)
    with caplog.at_level(logging.WARNING, "fused_merge"):
        optimizer.step()
        # A partition without parameters, as of ZeroRedundancyOptimizer.
        empty.step()
    assert not caplog.records
