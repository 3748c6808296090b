"""Which part of the delta belongs to which parameter: missing and reshaped tensors, stored deltas."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from device import DEVICE
from models import Model, assert_same, fill_gradients, optimizer_of, run, trained, training
from torch import nn

import fused_merge as fm
from fused_merge.eager.sparse import SparseTensor


@pytest.mark.parametrize(("method", "stored"), [("ondare", "random"), ("onties", "magnitude")])
def test_a_saved_delta_by_path_gives_the_same_run(method, stored, delta, tmp_path):
    delta.save(tmp_path / "dense.safetensors")
    delta.save(tmp_path / "sparse.safetensors", reserve_rate=0.5, method=stored, seed=3)
    runs = []
    for source in (delta, tmp_path / "dense.safetensors", str(tmp_path / "sparse.safetensors")):
        model, optimizer = training(source, method, seed=3)
        run(optimizer, model, 2)
        runs.append(optimizer)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    # All three are one delta: a run may be resumed with any of them.
    runs[2].load_state_dict(runs[0].state_dict())


@pytest.mark.parametrize("asked", [{"reserve_rate": 0.25}, {"reserve_rate": 1.0}, {"reserve_rate": 0.5, "seed": 4}])
def test_a_sparse_delta_must_match_what_is_asked_for(asked, delta, tmp_path):
    path = delta.save(tmp_path / "sparse.safetensors", reserve_rate=0.5, method="random", seed=3)
    _, optimizer = training(path, **{"seed": 3} | asked)
    with pytest.raises(ValueError, match=r"was saved with method='random', reserve_rate=0.5, seed=3"):
        optimizer.bind()


def test_a_later_reserve_rate_acts_on_the_update_only(delta):
    model, optimizer = training(delta)
    run(optimizer, model, 1)

    def kept_of(optimizer):
        return {name: optimizer._binding.of(name, DEVICE).tau.unpack() for name in delta.names}

    kept = kept_of(optimizer)
    optimizer.param_groups[0]["reserve_rate"] = 0.1
    run(optimizer, model, 1, first=1)
    # The same after a resume, where tau is sparsified anew.
    _, other = training(delta)
    other.load_state_dict(optimizer.state_dict())
    other.bind()
    for name, tau in kept.items():
        assert torch.equal(kept_of(optimizer)[name], tau)
        assert torch.equal(kept_of(other)[name], tau)


def test_a_missing_parameter_is_named(delta):
    model = trained()
    model.value_head = nn.Linear(16, 1).to(DEVICE)
    optimizer = optimizer_of(model, delta)
    fill_gradients(model, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"lacks 'value_head.weight', 'value_head.bias'; .* missing='plain'"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state


def test_a_missing_parameter_may_step_plainly(delta, caplog):
    model = trained()
    model.value_head = nn.Linear(16, 1).to(DEVICE)
    peer = copy.deepcopy(model.value_head)
    optimizer = optimizer_of(model, delta, missing="plain")
    theirs = torch.optim.AdamW(peer.parameters(), lr=1e-2, weight_decay=0.0)
    with caplog.at_level(logging.WARNING, "fused_merge"):
        for step in range(3):
            fill_gradients(model, step)
            for p, q in zip(model.value_head.parameters(), peer.parameters(), strict=True):
                q.grad = p.grad.clone()
            optimizer.step()
            theirs.step()
    for p, q in zip(model.value_head.parameters(), peer.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6 * q.abs().max()
    listed = [record.getMessage() for record in caplog.records]
    assert listed == ["stepping as plain AdamW, without a reference delta: 'value_head.weight', 'value_head.bias'"]


def test_missing_may_differ_by_group(delta):
    model = trained()
    model.value_head = nn.Linear(16, 1).to(DEVICE)
    named = list(model.named_parameters())
    groups = [{"params": named[:6]}, {"params": named[6:], "missing": "plain", "lr": 1.0}]
    optimizer = fm.OnDAREAdamW(groups, reference_delta=delta)
    run(optimizer, model, 1)
    assert optimizer.param_groups[1]["lr"] == 1.0


def test_a_reshaped_parameter_is_named(delta):
    model = trained()
    model.head = nn.Linear(16, 4, bias=False).to(DEVICE)
    optimizer = optimizer_of(model, delta)
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(4, 16\) and its reference delta \(3, 16\)"):
        optimizer.bind()


def test_tied_weights_are_one_tensor_under_their_first_name():
    def tied(seed):
        model = Model(seed, head=False)
        model.head = nn.Linear(8, 11, bias=False).to(DEVICE)
        model.head.weight = model.embed.weight
        return model

    delta = fm.ReferenceDelta.from_models(tied(0), tied(1))
    assert "embed.weight" in delta.names
    assert "head.weight" not in delta.names
    model = tied(1)
    optimizer = optimizer_of(model, delta)
    run(optimizer, model, 1)
    assert optimizer.state[model.embed.weight]["step"] == 1


def test_only_what_drops_anything_is_held_sparse(delta):
    for rate, kind in ((0.01, SparseTensor), (1.0, torch.Tensor)):
        _, optimizer = training(delta, reserve_rate=rate)
        optimizer.bind()
        assert all(isinstance(optimizer._binding.of(name, DEVICE).tau, kind) for name in delta.names)


def test_two_parameters_of_one_name_are_refused(delta):
    """As of a policy and a critic; a wrapper does not tell them apart."""
    one, two = trained(), trained()
    pairs = [*one.named_parameters(), *((f"module.{name}", p) for name, p in two.named_parameters())]
    optimizer = fm.OnDAREAdamW(pairs, reference_delta=delta)
    fill_gradients(one, 0)
    with pytest.raises(ValueError, match=r"two parameters are called 'embed.weight'; deltas are matched by name"):
        optimizer.step()
    assert not optimizer.state
