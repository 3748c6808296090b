"""`verify`: the kernels of a training run against the eager code, while it runs."""

from __future__ import annotations

import weakref

import pytest
import torch
from conftest import DEVICE
from models import Model, assert_same, fill_gradients, run, trained

import fused_merge as fm
from fused_merge import functional
from fused_merge.kernels import merging_adamw as kernel


@pytest.fixture
def delta() -> fm.ReferenceDelta:
    return fm.ReferenceDelta.from_models(Model(0), trained())


def triton_run(delta, dtype=torch.float32, **options):
    model = trained().to(dtype)
    options = {"lr": 1e-2, "alpha": 0.1, "reserve_rate": 0.5, "impl": "triton"} | options
    return model, fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, **options)


@pytest.fixture
def corrupt(monkeypatch):
    """Make every launch change one element of what it was given as this argument, of the tensor of 16 x 8."""
    launch = kernel.merging_adamw_

    def corrupt(argument, change):
        def corrupted(*lists, **options):
            launch(*lists, **options)
            for param, tensor in zip(lists[0], lists[argument], strict=True):
                if param.shape == (16, 8):
                    tensor.view(-1)[77] = change(tensor.view(-1)[77])

        monkeypatch.setattr(kernel, "merging_adamw_", corrupted)

    return corrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1, "maximize": True}, {"reserve_rate": 1.0}], ids=str)
def test_the_kernels_pass_and_the_run_is_unchanged(dtype, options, delta):
    (model, verified), (peer, plain) = (triton_run(delta, dtype, **options) for _ in range(2))
    fm.verify(verified, steps=3)
    run(verified, model, 4)
    run(plain, peer, 4)
    assert_same(verified, plain)
    assert torch.equal(torch.as_tensor(verified.grad_norm or 0), torch.as_tensor(plain.grad_norm or 0))


@pytest.mark.parametrize(("argument", "state"), [(0, "param"), (1, "grad"), (2, "exp_avg"), (3, "exp_avg_sq")])
def test_a_kernel_that_is_off_by_one_bit_is_named(argument, state, corrupt, delta):
    model, optimizer = triton_run(delta)
    fm.verify(optimizer)
    run(optimizer, model, 1)
    corrupt(argument, lambda x: torch.nextafter(x, torch.full_like(x, torch.inf)))
    sentence = rf"differ in '{state}' of 'hidden.weight', by at most \d\S*; train with impl='eager' and report"
    with pytest.raises(RuntimeError, match=sentence):
        run(optimizer, model, 1, first=1)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_number_that_is_none_is_a_difference(value, corrupt, delta):
    model, optimizer = triton_run(delta)
    fm.verify(optimizer)
    corrupt(0, lambda x: torch.full_like(x, value))
    with pytest.raises(RuntimeError, match=r"differ in 'param' of 'hidden\.weight'"):
        run(optimizer, model, 1)


def test_signs_of_zeros_are_bits_too(corrupt, delta):
    model, optimizer = triton_run(delta)
    fm.verify(optimizer)
    corrupt(2, lambda x: -x)
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
    corrupt(0, lambda x: x + 1)
    run(optimizer, model, 1, first=2)

    fm.verify(optimizer)
    assert optimizer.verify_steps == 10
    fm.verify(optimizer, steps=0)
    run(optimizer, model, 1, first=3)


@pytest.mark.parametrize(
    ("state", "dtype", "options"),
    [
        ("anchor", torch.float32, {"merge_every": 2}),
        ("anchor_decay", torch.float32, {"merge_every": 2}),
        ("master", torch.bfloat16, {"master": "fp32"}),
        ("master_low", torch.bfloat16, {"master": "split"}),
    ],
)
def test_what_a_kernel_will_keep_is_compared_as_well(state, dtype, options, delta, monkeypatch):
    """No kernel takes these states yet: eager code stands for one, with an error in the last element."""
    step = functional.merging_adamw_

    def stand_in(*lists, anchors, masters, impl, **others):
        gathered = step(*lists, anchors=anchors, masters=masters, impl="eager", **others)
        if impl == "triton" and lists[0][0].shape == (16, 8) and wrong:
            anchor = anchors[0] or (None, None)
            kept = {"anchor": anchor[0], "anchor_decay": anchor[1]}.get(state, masters[0])
            kept.view(-1)[-1:] += 1
        return gathered

    monkeypatch.setattr(functional, "merging_adamw_", stand_in)
    wrong = False
    (model, optimizer), (peer, plain) = (triton_run(delta, dtype, **options) for _ in range(2))
    fm.verify(optimizer)
    run(optimizer, model, 3)
    plain.impl = "eager"
    run(plain, peer, 3)
    assert_same(optimizer, plain)
    wrong = True
    with pytest.raises(RuntimeError, match=rf"differ in '{state}' of 'hidden\.weight', by at most 1;"):
        run(optimizer, model, 1, first=3)


def test_one_tensor_is_copied_at_a_time_and_the_delta_never(delta, monkeypatch):
    step = functional.merging_adamw_
    copies: list[weakref.ref] = []
    calls = []

    def watched(*lists, impl, **options):
        if impl == "eager":
            assert all(copy() is None for copy in copies)
            copies.extend(weakref.ref(column[0]) for column in lists[:5])
            assert lists[5][0] is optimizer._binding.of(names[len(calls)], DEVICE).kept
            calls.append([len(column) for column in lists])
        return step(*lists, impl=impl, **options)

    monkeypatch.setattr(functional, "merging_adamw_", watched)
    model, optimizer = triton_run(delta)
    names = [name for name, _ in model.named_parameters()]
    fm.verify(optimizer, steps=1)
    run(optimizer, model, 1)
    assert calls == [[1] * 6] * len(names)


@pytest.mark.parametrize("impl", ["eager", *(["auto"] if DEVICE.type == "cpu" else [])])
def test_eager_code_is_not_compared_with_itself(impl, delta):
    _, optimizer = triton_run(delta, impl=impl)
    with pytest.raises(ValueError, match="nothing to verify: this optimizer runs the eager code itself"):
        fm.verify(optimizer)
    assert optimizer.verify_steps == 0
    # To stop is never wrong.
    fm.verify(optimizer, steps=0)


def test_a_negative_number_of_steps_is_refused(delta):
    _, optimizer = triton_run(delta)
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        fm.verify(optimizer, steps=-1)
