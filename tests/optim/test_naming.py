"""How parameters get their names: given with them, found in the model, or by the order of the delta."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from models import Model, assert_same, fill_gradients, run, trained, training
from tiny import llama, save
from torch import nn

import fused_merge as fm

OPTIONS = {"lr": 1e-2, "alpha": 0.1, "reserve_rate": 0.5}


def decay_groups(model):
    """Parameters as trainers group them: not in the order of the model, and without names."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": [p for p in model.parameters() if p.ndim < 2]}]


def names_in(optimizer):
    return [name for group in optimizer.param_groups for name in group["param_names"]]


@pytest.fixture
def expected(delta):
    """A run of two steps whose parameters were given with their names."""
    model, optimizer = training(delta)
    run(optimizer, model, 2)
    return model


def assert_same_weights(model, expected):
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_wrapped_names_are_the_same_names(delta):
    (plain, one), wrapped = training(delta), nn.ModuleDict({"module": trained()})
    two = fm.OnDAREAdamW(wrapped.named_parameters(), reference_delta=delta, **OPTIONS)
    assert two.param_groups[0]["param_names"][0] == "module.embed.weight"
    run(one, plain, 2)
    run(two, wrapped, 2)
    assert_same(one, two)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.load_state_dict(one.state_dict())


@pytest.mark.parametrize("kind", [fm.MergingAdamW, fm.OnDAREAdamW, fm.OnTIESAdamW, fm.OnProjAdamW])
@pytest.mark.parametrize("as_pairs", [False, True])
def test_every_class_finds_names_in_the_model(kind, as_pairs, delta):
    options = {"reference_delta": delta, "lr": 1e-2, "alpha": 0.1}
    named_model, bare_model = trained(), trained()
    named = kind(named_model.named_parameters(), **options)
    names_of = bare_model.named_parameters() if as_pairs else bare_model
    bare = kind(list(bare_model.parameters())[::-1], names_of=names_of, **options)
    assert names_in(bare) == names_in(named)[::-1]
    run(named, named_model, 2)
    run(bare, bare_model, 2)
    assert_same_weights(bare_model, named_model)


def test_groups_in_any_order_find_their_names(expected, delta):
    model = trained()
    groups = [{**group, "weight_decay": 0.0} for group in reversed(decay_groups(model))]
    groups = [{"params": []}, *groups, {"params": []}]
    optimizer = fm.OnDAREAdamW(groups, reference_delta=delta, names_of=model, **OPTIONS)
    run(optimizer, model, 2)
    assert_same_weights(model, expected)
    assert [len(group["param_names"]) for group in optimizer.param_groups] == [0, 3, 3, 0]


def test_part_of_the_model_finds_its_names(expected, delta):
    model = trained()
    optimizer = fm.OnDAREAdamW([model.hidden.bias], reference_delta=delta, names_of=model, **OPTIONS)
    run(optimizer, model, 2)
    assert torch.equal(model.hidden.bias, expected.hidden.bias)


def test_empty_groups_may_stand_between_named_ones(delta):
    model = trained()
    named = list(model.named_parameters())
    groups = [{"params": []}, {"params": named[:2]}, {"params": []}, {"params": named[2:]}]
    run(fm.OnDAREAdamW(groups, reference_delta=delta, **OPTIONS), model, 2)
    peer, optimizer = training(delta)
    run(optimizer, peer, 2)
    assert_same_weights(model, peer)


def test_a_group_that_is_added_later_may_bring_a_model(delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(list(model.parameters()), reference_delta=delta, names_of=model, missing="plain")
    extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"parameter 0 of group 1, of shape \(2, 2\), is no parameter of names_of"):
        optimizer.add_param_group({"params": list(extra.parameters())})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": list(extra.parameters()), "names_of": extra})
    assert optimizer.param_groups[1]["param_names"] == ["weight", "bias"]
    fill_gradients(extra, 0)
    optimizer.step()


@pytest.mark.parametrize("wrong", [lambda model: model.parameters(), lambda model: model.state_dict()])
def test_what_has_no_names_is_refused(wrong, delta):
    model = trained()
    with pytest.raises(TypeError, match=r"names_of takes a module or \(name, parameter\) pairs such as model.named_pa"):
        fm.OnDAREAdamW(model.parameters(), reference_delta=delta, names_of=wrong(model))


def test_parameters_of_another_model_are_refused(delta):
    with pytest.raises(ValueError, match=r"parameter 0 of group 0, of shape \(11, 8\), is no parameter of names"):
        fm.OnDAREAdamW(trained().parameters(), reference_delta=delta, names_of=trained())


@pytest.mark.parametrize("wrong", [{1}, None])
def test_what_torch_refuses_is_still_refused_by_torch(wrong, delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.parameters(), reference_delta=delta, names_of=model)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": wrong} if wrong else [])


def test_replaced_parameters_keep_their_names(expected, delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(decay_groups(model), reference_delta=delta, names_of=model, **OPTIONS)
    old = weakref.ref(model.embed.weight)
    # As Accelerate does under FSDP2.
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            new = nn.Parameter(parameter.detach().clone())
            module._parameters[name] = new
            for group in optimizer.param_groups:
                group["params"] = [new if each is parameter else each for each in group["params"]]
    del parameter
    gc.collect()
    assert old() is None
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    run(optimizer, model, 2)
    assert_same_weights(model, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_keeps_the_names(copied, expected, delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(decay_groups(model)[::-1], reference_delta=delta, names_of=model, **OPTIONS)
    other, copy_of_it = copied((model, optimizer))
    for group in copy_of_it.param_groups:
        group["weight_decay"] = 0.0
    run(copy_of_it, other, 2)
    assert_same_weights(other, expected)


def test_a_state_dict_holds_names_and_no_model(delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.parameters(), reference_delta=delta, names_of=model, **OPTIONS)
    named = fm.OnDAREAdamW(trained().named_parameters(), reference_delta=delta, **OPTIONS)
    assert optimizer.state_dict() == named.state_dict()


def test_unnamed_parameters_are_bound_in_the_models_order(expected, delta):
    model = trained()
    run(fm.OnDAREAdamW(model.parameters(), reference_delta=delta, **OPTIONS), model, 2)
    assert_same_weights(model, expected)


def test_a_path_and_bare_parameters_are_enough(expected, delta, tmp_path):
    path, model = delta.save(tmp_path / "tau.safetensors"), trained()
    run(fm.OnDAREAdamW(model.parameters(), reference_delta=str(path), **OPTIONS), model, 2)
    assert_same_weights(model, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_the_delta_of_two_folders_knows_the_order_of_the_model(tied, tmp_path):
    base, tuned, peer = llama(0, tied=tied), llama(1, tied=tied), llama(1, tied=tied)
    folders = [save(model, tmp_path / name) for model, name in ((base, "base"), (tuned, "sft"))]
    path = fm.ReferenceDelta.from_checkpoints(*folders).save(tmp_path / "tau.safetensors")
    run(fm.OnDAREAdamW(tuned.parameters(), reference_delta=path, **OPTIONS), tuned, 2)
    run(fm.OnDAREAdamW(peer.named_parameters(), reference_delta=path, **OPTIONS), peer, 2)
    assert_same_weights(tuned, peer)


def test_unnamed_groups_that_share_no_shape_leave_no_choice():
    model, tuned = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(4)) for _ in range(2))
    delta = fm.ReferenceDelta.from_models(model, tuned)
    tensors = dict(model.named_parameters())
    matrices = ["0.weight", "1.weight"]
    rest = [tensors[name] for name in tensors if name not in matrices]
    groups = [{"params": rest}, {"params": [tensors[name] for name in matrices]}]
    optimizer = fm.OnDAREAdamW(groups, reference_delta=delta, **OPTIONS)
    peer = copy.deepcopy(model)
    named = fm.OnDAREAdamW(peer.named_parameters(), reference_delta=delta, **OPTIONS)
    run(optimizer, model, 2)
    run(named, peer, 2)
    assert_same_weights(model, peer)


def test_one_group_in_another_order_leaves_no_choice_where_all_shapes_differ():
    model, tuned = (nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)) for _ in range(2))
    delta = fm.ReferenceDelta.from_models(model, tuned)
    peer = copy.deepcopy(model)
    run(fm.OnDAREAdamW(reversed(list(model.parameters())), reference_delta=delta, **OPTIONS), model, 2)
    run(fm.OnDAREAdamW(peer.named_parameters(), reference_delta=delta, **OPTIONS), peer, 2)
    assert_same_weights(model, peer)


def test_unnamed_parameters_that_could_be_matched_in_two_ways_are_refused(delta):
    model = trained()
    parameters = list(model.parameters())
    sentence = r"3 unnamed parameters have shape \(16,\), and the order of .* which is which; pass names_of=model"
    # Three tensors of (16,): hidden.bias, norm.weight, norm.bias.
    apart = [{"params": parameters[:3]}, {"params": parameters[3:]}]
    for groups in (apart, parameters[::-1]):
        optimizer = fm.OnDAREAdamW(groups, reference_delta=delta)
        fill_gradients(model, 0)
        with pytest.raises(ValueError, match=sentence):
            optimizer.step()
        assert_same_weights(model, trained())
        assert not optimizer.state


def test_unnamed_parameters_that_do_not_fit_are_refused(delta):
    few = fm.OnDAREAdamW(list(trained().parameters())[1:], reference_delta=delta)
    with pytest.raises(ValueError, match=r"5 unnamed parameters do not match the 6 tensors .*; pass names_of=model"):
        few.bind()


def test_unnamed_parameters_are_refused_by_a_delta_of_files(tmp_path):
    from safetensors.torch import save_file

    model = trained().cpu()
    save_file(Model(0).cpu().state_dict(), tmp_path / "base.safetensors")
    save_file(model.state_dict(), tmp_path / "sft.safetensors")
    delta = fm.ReferenceDelta.from_checkpoints(tmp_path / "base.safetensors", tmp_path / "sft.safetensors")
    optimizer = fm.OnDAREAdamW(model.parameters(), reference_delta=delta)
    with pytest.raises(ValueError, match=r"does not know its model's order of parameters; pass names_of=model"):
        optimizer.bind()
