"""What an optimizer keeps: state dicts, resumed runs, DCP, copies, devices."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from bits import assert_same_bits
from device import DEVICE
from models import (
    IMPLS,
    STATEFUL,
    Model,
    assert_same,
    every_state,
    fill_gradients,
    optimizer_of,
    run,
    snapshot,
    trained,
    training,
)
from torch import nn

from fused_merge.eager.sparse import SparseTensor
from fused_merge.optim import merging_adamw


def unpickled(pair):
    return pickle.loads(pickle.dumps(pair))


@every_state
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_keeps_every_bit_in_a_folder(dtype, options, delta, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    (straight, one), (resumed, two) = (training(delta, dtype=dtype, **options) for _ in range(2))
    run(one, straight, 7)
    run(two, resumed, 4)
    weights, state = get_state_dict(resumed, two)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "dcp", no_dist=True)

    fresh = Model(7).to(dtype)
    three = optimizer_of(fresh, delta, **options)
    weights, state = get_state_dict(fresh, three)
    target = {"model": weights, "optimizer": state}
    dcp.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    set_state_dict(fresh, three, model_state_dict=target["model"], optim_state_dict=target["optimizer"])
    assert_same(two, three)
    run(three, fresh, 3, first=4)
    assert_same(one, three)


@every_state
@pytest.mark.parametrize(
    "how", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True, "cpu_offload": True}], ids=str
)
def test_distributed_checkpoint_gathers_every_form_of_state_dict(how, dtype, options, delta):
    """As torchtitan (flattened) and Accelerate (full, on the CPU) ask for it."""
    from torch.distributed.checkpoint import state_dict as dcp

    (model, one), (other, two) = (training(delta, dtype=dtype, **options) for _ in range(2))
    run(one, model, 4)
    saved = dcp.get_optimizer_state_dict(model, one, options=dcp.StateDictOptions(**how))
    other.load_state_dict(model.state_dict())
    dcp.set_optimizer_state_dict(other, two, saved, options=dcp.StateDictOptions(**how))
    assert_same(one, two)
    assert {key: value for key, value in two.param_groups[0].items() if key != "params"} == {
        key: value for key, value in one.param_groups[0].items() if key != "params"
    }
    run(one, model, 3, first=4)
    run(two, other, 3, first=4)
    assert_same(one, two)


@every_state
def test_the_probe_of_a_distributed_checkpoint_moves_nothing(dtype, options, delta):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = trained().to(dtype)
    before = copy.deepcopy(model.state_dict())
    optimizer = optimizer_of(model, delta, **options)
    get_optimizer_state_dict(model, optimizer)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for p in model.parameters():
        state = optimizer.state[p]
        assert state["step"] == 1
        assert not state["exp_avg"].any()
        assert not state["exp_avg_sq"].any()
        for key in ("master", "anchor"):
            assert key not in state or torch.equal(state[key].to(dtype), p)
        assert "master_low" not in state or not state["master_low"].any()
        assert "anchor_decay" not in state or state["anchor_decay"] == 1


@every_state
@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
def test_a_copy_goes_on_with_the_same_bits(copied, dtype, options, delta):
    model, optimizer = training(delta, dtype=dtype, **options)
    run(optimizer, model, 4)
    # Model and optimizer together: the copy's parameters are those of the copied model.
    twin_model, twin = copied((model, optimizer))
    assert twin.param_groups[0]["params"][0] is twin_model.embed.weight
    assert twin_model.embed.weight is not model.embed.weight
    assert_same(optimizer, twin)
    run(twin, twin_model, 3, first=4)
    untouched = snapshot(optimizer)
    run(twin, twin_model, 1, first=7)
    assert_same_bits(snapshot(optimizer), untouched)
    run(optimizer, model, 4, first=4)
    assert_same(optimizer, twin)


def test_a_copy_keeps_hyper_parameters_and_what_is_fixed(delta):
    model, optimizer = training(delta, impl="eager", stats_every=1, max_grad_norm=1.0, seed=3)
    run(optimizer, model, 1)
    _, twin = pickle.loads(pickle.dumps((model, optimizer)))
    assert (twin.impl, twin.stats_every, twin.grad_norm) == ("eager", 1, optimizer.grad_norm)
    assert twin.merge_stats() == optimizer.merge_stats()
    twin.param_groups[0]["seed"] = 4
    with pytest.raises(ValueError, match=r"seed of a group is fixed once it has taken a step: it was 3 and is 4"):
        twin.step()


@pytest.mark.parametrize(
    ("option", "other"), [("merge_every", 2), ("master", "fp32"), ("seed", 1), ("state_dtype", torch.bfloat16)]
)
def test_what_a_state_was_made_with_is_fixed_from_then_on(option, other, delta):
    model = trained().bfloat16()
    lacking = trained().bfloat16()
    lacking.extra = nn.Linear(2, 2).to(DEVICE, torch.bfloat16)
    sentence = rf"{option} of a group is fixed once it has taken a step: it was .* set it back, or make a new optimizer"

    # A step that was refused has made no state.
    refused = optimizer_of(lacking, delta)
    fill_gradients(lacking, 0)
    with pytest.raises(ValueError, match=r"lacks 'extra\.weight'"):
        refused.step()
    refused.param_groups[0] |= {option: other, "missing": "plain"}
    refused.step()

    optimizer = optimizer_of(model, delta)
    default = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = other
    optimizer.bind()
    optimizer.param_groups[0][option] = default
    run(optimizer, model, 1)
    before = snapshot(optimizer)
    optimizer.param_groups[0][option] = other
    fill_gradients(model, 1)
    with pytest.raises(ValueError, match=sentence):
        optimizer.step()
    assert_same_bits(snapshot(optimizer), before)
    optimizer.param_groups[0][option] = default
    optimizer.step()

    # A loaded state is as fixed as one that was made here; an empty one fixes nothing.
    loaded = optimizer_of(model, delta)
    loaded.load_state_dict(optimizer.state_dict())
    loaded.param_groups[0][option] = other
    with pytest.raises(ValueError, match=sentence):
        loaded.step()
    empty = optimizer_of(trained().bfloat16(), delta)
    empty.load_state_dict(optimizer_of(model, delta).state_dict())
    empty.param_groups[0][option] = other
    empty.step()


@pytest.mark.parametrize("options", [{}, {"merge_every": 3}, {"master": "split"}, {"project": "conflict"}])
def test_delta_and_states_follow_a_moved_parameter(options, delta, monkeypatch):
    """The meta device stands for another one: it has no data and nothing may be read there."""
    dtype = torch.bfloat16 if "master" in options else torch.float32
    model, optimizer = training(delta, dtype=dtype, **options)
    run(optimizer, model, 2)
    elsewhere = torch.device("meta")
    p = model.hidden.weight
    moved = nn.Parameter(p.detach().to(elsewhere))
    torch.utils.swap_tensors(p, moved)
    p.grad = torch.ones_like(p)
    for other in model.parameters():
        if other is not p:
            other.grad = None
    seen = []

    def take(prepared):
        for o in prepared.operands:
            seen.extend(value for value in (*o, *(o.anchor or ())) if isinstance(value, (torch.Tensor, SparseTensor)))
        return [[None]]

    monkeypatch.setattr(merging_adamw, "take", take)
    optimizer.step()
    assert len(seen) == 6 + {"merge_every": 2}.get(next(iter(options), ""), len(options))
    assert {value.device for value in seen} == {elsewhere}


@pytest.mark.parametrize(
    ("bad", "impl", "dtype", "options"),
    [
        (torch.inf, "triton", torch.float32, {}),
        (torch.nan, "triton", torch.bfloat16, {}),
        *((bad, "eager", *stateful) for bad in (torch.inf, torch.nan) for stateful in STATEFUL),
    ],
)
def test_an_overflow_moves_nothing_and_drops_the_scale(bad, impl, dtype, options, delta):
    options = options | {"impl": impl, "max_grad_norm": None if impl == "triton" else 1.0}
    model, optimizer = training(delta, dtype=dtype, **options)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**4)
    scaler.scale(torch.ones((), device=DEVICE))
    run(optimizer, model, 2)
    before = snapshot(optimizer)
    fill_gradients(model, 2)
    # One element of one tensor stops all of them.
    model.norm.bias.grad[3] = bad
    scaler.step(optimizer)
    scaler.update()
    assert_same_bits(snapshot(optimizer), before)
    assert scaler.get_scale() == 2.0**3
    # And the next step is the one that was not taken.
    straight, other = training(delta, dtype=dtype, **options)
    run(other, straight, 3)
    run(optimizer, model, 1, first=2)
    assert_same(optimizer, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_overflow_in_the_very_first_step_leaves_step_zero(impl, delta):
    (model, optimizer), (straight, other) = (training(delta, impl=impl) for _ in range(2))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0)
    scaler.scale(torch.ones((), device=DEVICE))
    fill_gradients(model, 0)
    model.embed.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert all(optimizer.state[p]["step"] == 0 for p in model.parameters())
    run(optimizer, model, 2)
    run(other, straight, 2)
    assert_same(optimizer, other)
