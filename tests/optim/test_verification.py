"""`verify`: the kernels of a training run against the eager code, while it runs."""

from __future__ import annotations

import weakref

import pytest
import torch
from device import DEVICE
from models import assert_same, fill_gradients, run, training

import fused_merge as fm
from fused_merge.kernels import launch
from fused_merge.optim import verification


def triton_run(delta, **options):
    return training(delta, **{"impl": "triton"} | options)


def part(operands, state):
    """Return a tensor of `Operands` by the name that an optimizer's state has for it."""
    if state.startswith("anchor"):
        return operands.anchor.weights if state == "anchor" else operands.anchor.decay
    return operands.master if state.startswith("master") else getattr(operands, state)


@pytest.fixture
def corrupt(monkeypatch):
    """Make every launch change one element of this state of the tensor of 16 x 8."""
    run = launch.run

    def corrupt(state, change):
        def corrupted(prepared):
            sums = yield from run(prepared)
            for own in prepared.operands:
                if own.param.shape == (16, 8):
                    last = part(own, state).view(-1)[-1:]
                    last.copy_(change(last))
            return sums

        monkeypatch.setattr(launch, "run", corrupted)

    return corrupt


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"max_grad_norm": 0.1, "maximize": True}),
        (torch.bfloat16, {"reserve_rate": 1.0}),
    ],
    ids=str,
)
def test_the_kernels_pass_and_the_run_is_unchanged(dtype, options, delta):
    (model, verified), (peer, plain) = (triton_run(delta, dtype=dtype, **options) for _ in range(2))
    fm.verify(verified, steps=2)
    run(verified, model, 3)
    run(plain, peer, 3)
    assert_same(verified, plain)
    assert torch.equal(torch.as_tensor(verified.grad_norm or 0), torch.as_tensor(plain.grad_norm or 0))


@pytest.mark.parametrize("state", ["param", "grad", "exp_avg", "exp_avg_sq", "step"])
def test_a_kernel_that_is_off_by_one_bit_is_named(state, corrupt, delta):
    model, optimizer = triton_run(delta)
    fm.verify(optimizer)
    run(optimizer, model, 1)
    corrupt(state, lambda x: torch.nextafter(x, torch.full_like(x, torch.inf)))
    sentence = rf"differ in '{state}' of 'hidden.weight', by at most \d\S*; train with impl='eager' and report"
    with pytest.raises(RuntimeError, match=sentence):
        run(optimizer, model, 1, first=1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_a_difference(value, corrupt, delta):
    model, optimizer = triton_run(delta)
    fm.verify(optimizer)
    corrupt("param", lambda x: torch.full_like(x, value))
    with pytest.raises(RuntimeError, match=r"differ in 'param' of 'hidden\.weight'"):
        run(optimizer, model, 1)


def test_signs_of_zeros_are_bits_too(corrupt, delta):
    model, optimizer = triton_run(delta)
    fm.verify(optimizer)
    corrupt("exp_avg", lambda x: -x)
    fill_gradients(model, 0)
    for p in model.parameters():
        p.grad.zero_()
    with pytest.raises(RuntimeError, match=r"differ in 'exp_avg' of 'hidden\.weight', by at most 0;"):
        optimizer.step()


def test_nan_equals_nan(delta):
    model, optimizer = triton_run(delta, reserve_rate=1.0)
    fm.verify(optimizer)
    fill_gradients(model, 0)
    model.hidden.weight.grad[0, 0] = torch.nan
    optimizer.step()
    assert model.hidden.weight.isnan().any()


def test_it_counts_down_and_stops(corrupt, delta):
    model, optimizer = triton_run(delta)
    fm.verify(optimizer, steps=2)
    run(optimizer, model, 1)
    assert optimizer.verify_steps == 1
    run(optimizer, model, 1, first=1)
    assert optimizer.verify_steps == 0
    corrupt("param", lambda x: x + 1)
    run(optimizer, model, 1, first=2)

    fm.verify(optimizer)
    assert optimizer.verify_steps == 10
    fm.verify(optimizer, steps=0)
    run(optimizer, model, 1, first=3)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        fm.verify(optimizer, steps=-1)


@pytest.mark.parametrize(
    ("state", "dtype", "options"),
    [
        ("anchor", torch.float32, {"merge_every": 2}),
        ("anchor_decay", torch.float32, {"merge_every": 2}),
        ("master", torch.bfloat16, {"master": "fp32"}),
        ("master_low", torch.bfloat16, {"master": "split"}),
    ],
)
def test_every_other_state_is_compared_as_well(state, dtype, options, delta, corrupt):
    (model, optimizer), (peer, plain) = (triton_run(delta, dtype=dtype, **options) for _ in range(2))
    fm.verify(optimizer)
    run(optimizer, model, 3)
    plain.impl = "eager"
    run(plain, peer, 3)
    assert_same(optimizer, plain)
    corrupt(state, lambda x: x + 1)
    with pytest.raises(RuntimeError, match=rf"differ in '{state}' of 'hidden\.weight', by at most 1;"):
        run(optimizer, model, 1, first=3)


def test_the_way_that_thresholds_are_found_while_training_is_what_is_compared(delta):
    model, optimizer = triton_run(delta, method="onties", reserve_rate=0.2)
    fm.verify(optimizer)
    run(optimizer, model, 3)
    parts = [optimizer._workspace.part(name) for name, _ in model.named_parameters()]
    thresholds = [kept.thresholds for part in parts for kept in part.keep(("step", "triton", DEVICE), None)._launches]
    assert len(thresholds) == len(parts)
    # Each has found one, which the next step starts from.
    assert all((threshold > 0) & (threshold < 0x7F800000) for threshold in thresholds)


def test_one_tensor_is_copied_at_a_time_and_the_delta_never(delta, monkeypatch):
    step = verification.step_
    copies: list[weakref.ref] = []
    calls = []

    def watched(operands, **options):
        (o,) = operands
        if options["impl"] == "eager":
            assert all(copy() is None for copy in copies)
            copies.extend(map(weakref.ref, (o.param, o.grad, o.exp_avg, o.exp_avg_sq, o.step)))
            assert o.tau is optimizer._binding.of(o.name, DEVICE).tau
            calls.append(o.name)
        return step(operands, **options)

    monkeypatch.setattr(verification, "step_", watched)
    model, optimizer = triton_run(delta)
    fm.verify(optimizer, steps=1)
    run(optimizer, model, 1)
    assert calls == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("impl", ["eager", *(["auto"] if DEVICE.type == "cpu" else [])])
def test_eager_code_is_not_compared_with_itself(impl, delta):
    _, optimizer = triton_run(delta, impl=impl)
    with pytest.raises(ValueError, match="nothing to verify: this optimizer runs the eager code itself"):
        fm.verify(optimizer)
    assert optimizer.verify_steps == 0
    # To stop is never wrong.
    fm.verify(optimizer, steps=0)


def test_the_environment_asks_for_it_as_well(delta, corrupt, monkeypatch):
    monkeypatch.setenv("FUSED_MERGE_VERIFY", "2")
    model, optimizer = triton_run(delta)
    run(optimizer, model, 1)
    assert optimizer.verify_steps == 1
    corrupt("param", lambda x: x + 1)
    with pytest.raises(RuntimeError, match=r"differ in 'param' of 'hidden\.weight'"):
        run(optimizer, model, 1, first=1)
    monkeypatch.setenv("FUSED_MERGE_VERIFY", "always")
    model, optimizer = triton_run(delta)
    with pytest.raises(ValueError, match="FUSED_MERGE_VERIFY must be a number of steps to compare, got 'always'"):
        run(optimizer, model, 1)
    assert not optimizer.state


def test_the_environment_only_warns_where_eager_code_runs(delta, monkeypatch, caplog):
    monkeypatch.setenv("FUSED_MERGE_VERIFY", "2")
    model, optimizer = triton_run(delta, impl="eager")
    run(optimizer, model, 1)
    assert optimizer.verify_steps == 0
    assert "FUSED_MERGE_VERIFY=2: there is nothing to verify" in caplog.text
