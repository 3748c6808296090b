"""torchtune: an optimizer of each parameter, stepping in the backward pass. torchtune itself is not run here.

Its last version, 0.6.1, imports what torchao no longer has. What stands in for it does what its single-device full
fine-tuning does with an optimizer: `instantiate` (config/_instantiate.py), `register_optim_in_bwd_hooks` and
`OptimizerInBackwardWrapper` (training/memory.py).
"""

from __future__ import annotations

import importlib

import pytest
import torch
from bits import assert_same_bits
from models import Model, snapshot, trained

import fused_merge as fm

OPTIONS = {"lr": 1e-2, "alpha": 0.1, "reserve_rate": 0.5, "merge_every": 3}


@pytest.fixture
def file(tmp_path):
    return str(fm.ReferenceDelta.from_models(Model(0), trained()).save(tmp_path / "tau.safetensors"))


def instantiate(params, _component_, **options):
    """Make the component of a recipe's YAML."""
    module, _, name = _component_.rpartition(".")
    return getattr(importlib.import_module(module), name)(params, **options)


def step_in_backward(model, optimizers):
    def optim_step(param):
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(optim_step)


def backward(model, seed):
    tokens = torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(seed)).to(
        next(model.parameters()).device
    )
    torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens % 3).flatten()).backward()


def of_each_parameter(model, file):
    return {p: fm.OnDAREAdamW([(n, p)], reference_delta=file, **OPTIONS) for n, p in model.named_parameters()}


def trained_at_once(file, steps):
    model = trained(2)
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=file, **OPTIONS)
    for seed in range(steps):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def test_optimizers_in_the_backward_pass_take_the_steps_of_one(file):
    model = trained(2)
    optimizers = of_each_parameter(model, file)
    step_in_backward(model, optimizers)
    for seed in range(4):
        backward(model, seed)
    assert all(p.grad is None for p in model.parameters())
    assert_same_bits([snapshot(o)[0] for o in optimizers.values()], snapshot(trained_at_once(file, 4)))


def test_their_states_are_saved_by_name_and_go_on(file):
    first, second = trained(2), Model(7)
    optimizers = of_each_parameter(first, file)
    step_in_backward(first, optimizers)
    for seed in range(4):
        backward(first, seed)
    saved = {name: optimizers[param].state_dict() for name, param in first.named_parameters()}
    second.load_state_dict(first.state_dict())
    resumed = of_each_parameter(second, file)
    for name, param in second.named_parameters():
        resumed[param].load_state_dict(saved[name])
    step_in_backward(second, resumed)
    for seed in range(4, 8):
        backward(second, seed)
    assert_same_bits([snapshot(o)[0] for o in resumed.values()], snapshot(trained_at_once(file, 8)))


def test_the_component_of_a_recipe_finds_the_names_in_the_file(file):
    model = trained(2)
    optimizer = instantiate(model.parameters(), "fused_merge.OnDAREAdamW", reference_delta=file, **OPTIONS)
    for seed in range(4):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert_same_bits(snapshot(optimizer), snapshot(trained_at_once(file, 4)))


def test_a_parameter_without_a_name_is_no_part_of_a_whole_delta(file):
    param = next(trained(2).parameters())
    optimizer = instantiate([param], "fused_merge.OnDAREAdamW", reference_delta=file, **OPTIONS)
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"unnamed parameters? .*pass .*named_parameters"):
        optimizer.step()
