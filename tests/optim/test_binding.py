"""Which part of the delta belongs to which parameter: missing and reshaped tensors, stored deltas."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from bits import assert_same_bits
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


@pytest.mark.parametrize("missing", ["error", "plain"])
def test_a_delta_of_which_nothing_is_found_is_refused_whatever_may_be_missing(missing, delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(
        ((f"policy.{name}", p) for name, p in model.named_parameters()), reference_delta=delta, missing=missing
    )
    fill_gradients(model, 0)
    before = copy.deepcopy(model.state_dict())
    sentence = (
        r"holds none of the parameters of this optimizer: they are 'policy.embed.weight' and 5 more, and it has "
        r"'embed.weight' and 5 more; pass \(name.removeprefix\('policy.'\), parameter\) for all of "
        r"model.named_parameters\(\), or make the delta of the model that is trained, or use torch.optim.AdamW where"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            optimizer.step()
    assert_same_bits(before, model.state_dict())
    assert not optimizer.state


def test_a_head_in_an_optimizer_of_its_own_is_sent_to_torch(delta):
    head = nn.Linear(16, 1)
    optimizer = fm.OnDAREAdamW(head.named_parameters("value_head"), reference_delta=delta, missing="plain")
    with pytest.raises(ValueError, match=r"are 'value_head.weight' and 1 more, .* or use torch.optim.AdamW where"):
        optimizer.bind()
    # Beside one parameter that is merged it may stand, also where it comes later: when it is unfrozen, for example.
    model = trained()
    optimizer = fm.OnDAREAdamW([("hidden.bias", model.hidden.bias)], reference_delta=delta, missing="plain")
    optimizer.bind()
    optimizer.add_param_group({"params": list(head.named_parameters("value_head"))})
    optimizer.bind()


def test_an_optimizer_of_a_part_of_the_model_needs_no_more_than_its_part(delta):
    """As a stage of a pipeline, or a partition of ZeroRedundancyOptimizer."""
    named = list(trained().named_parameters())
    for part in (named[:1], named[1:4], named[4:]):
        fm.OnDAREAdamW(part, reference_delta=delta).bind()


@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_a_frozen_parameter_is_neither_bound_nor_demanded_until_it_is_unfrozen(rate, delta, monkeypatch):
    read, original = [], fm.ReferenceDelta.read
    monkeypatch.setattr(fm.ReferenceDelta, "read", lambda self, name, *a: read.append(name) or original(self, name, *a))

    def halves(model):
        return list(model.parameters())[:3], list(model.parameters())[3:]

    model, peer = trained(), trained()
    model.value_head = nn.Linear(16, 1).to(DEVICE)
    model.value_head.requires_grad_(False)
    optimizer = optimizer_of(model, delta, reserve_rate=rate)
    frozen = halves(model)[1]
    for p in frozen:
        p.requires_grad_(False)

    def fill(model, seed):
        fill_gradients(model, seed)
        for p in model.parameters():
            p.grad = p.grad if p.requires_grad else None

    fill(model, 0)
    optimizer.step()
    assert sorted(set(read)) == sorted(name for name, _ in list(model.named_parameters())[:3])
    assert not any(p in optimizer.state for p in frozen)
    # Unfrozen, they are merged from then on; what has no delta is demanded then.
    for p in frozen[:3]:
        p.requires_grad_(True)
    fill(model, 1)
    optimizer.step()
    assert set(read) == set(delta.names)

    whole = optimizer_of(peer, delta, reserve_rate=rate)
    fill_gradients(peer, 0)
    for p in halves(peer)[1]:
        p.grad = None
    whole.step()
    fill_gradients(peer, 1)
    whole.step()
    for p, q in zip(list(model.parameters())[:6], peer.parameters(), strict=True):
        assert_same_bits({"param": p} | optimizer.state[p], {"param": q} | whole.state[q])

    model.value_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"lacks 'value_head.weight', 'value_head.bias'"):
        optimizer.step()


def test_a_frozen_parameter_whose_name_is_taken_is_not_in_the_way(delta):
    """As of the reference model that some trainers keep beside the policy."""
    model, frozen = trained(), trained().requires_grad_(False)
    pairs = [*model.named_parameters(), *frozen.named_parameters()]
    optimizer = fm.OnDAREAdamW(pairs, reference_delta=delta)
    fill_gradients(model, 0)
    optimizer.step()
    assert len(optimizer.state) == 6


def test_a_gradient_that_was_left_on_a_frozen_parameter_moves_it_as_in_torch(delta):
    model, optimizer = training(delta)
    run(optimizer, model, 1)
    other, second = training(delta)
    other.requires_grad_(False)
    run(second, other, 1)
    assert_same(optimizer, second)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("original", [True, False])
def test_what_fsdp1_has_flattened_is_sent_to_fsdp2(original, delta, one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel

    sentence = r"was flattened by FullyShardedDataParallel \(FSDP1\), .*; shard the model with FSDP2, .*fully_shard"
    model = trained().cpu()
    early = optimizer_of(model, delta)
    fill_gradients(model, 0)
    sharded = FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))
    named = list(sharded.named_parameters())
    for params in (named, [p for _, p in named]):
        with pytest.raises(ValueError, match=f"parameter .* {sentence}"):
            fm.OnDAREAdamW(params, reference_delta=delta, missing="plain")
    if original:
        # The parameters are still those that the optimizer was made of.
        before = [p.detach().clone() for _, p in named]
        for _ in range(2):
            with pytest.raises(ValueError, match=f"parameter 'embed.weight' {sentence}"):
                early.step()
        assert not early.state
        assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
