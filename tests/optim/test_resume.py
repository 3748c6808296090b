"""State dicts: saved, loaded, gathered by torch.distributed.checkpoint, and refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from models import Model, assert_same, every_state, optimizer_of, run, snapshot, trained, training

import fused_merge as fm
from fused_merge.eager import rounding


def test_a_loaded_state_is_not_shared(delta):
    (model, one), (other, two) = (training(delta) for _ in range(2))
    run(one, model, 1)
    two.load_state_dict(one.state_dict())
    before = snapshot(one)
    run(two, other, 1)
    assert_same_bits(snapshot(one), before)


def test_a_run_goes_on_in_the_other_backend(delta):
    (one_model, one), (two_model, two) = (training(delta, impl=impl) for impl in ("eager", "triton"))
    for first in (0, 2):
        run(one, one_model, 2, first)
        run(two, two_model, 2, first)
        assert_same(one, two)
        two.load_state_dict(one.state_dict())


def test_a_state_dict_of_torch_adamw_loads_as_it_is(delta):
    model, peer = trained(), trained()
    theirs = torch.optim.AdamW(peer.parameters(), lr=3e-3, betas=(0.7, 0.8), weight_decay=0.2)
    run(theirs, peer, 3)
    ours = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, alpha=0.0, reserve_rate=1.0)
    ours.load_state_dict(theirs.state_dict())
    model.load_state_dict(peer.state_dict())
    group = ours.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (3e-3, (0.7, 0.8), 0.2)
    assert (group["alpha"], group["reserve_rate"], group["method"]) == (0.0, 1.0, "ondare")
    run(ours, model, 3, first=3)
    run(theirs, peer, 3, first=3)
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        assert ours.state[p]["step"] == 6
        assert (p - q).abs().max() <= 1e-6 * q.abs().max()


def test_an_adamw_that_computes_something_else_is_refused(delta):
    model, ours = training(delta)
    theirs = torch.optim.AdamW(model.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="saved with amsgrad=True, which this optimizer lacks"):
        ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda p: torch.optim.SGD(p, lr=1e-2), "have a learning rate and no betas"),
        (
            lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
            "it holds 'momentum_buffer' of parameter 0, and not 'step'",
        ),
        (lambda p: torch.optim.Adamax(p), "it holds 'step', 'exp_avg', 'exp_inf' of parameter 0, and not"),
        (
            lambda p: torch.optim.NAdam(p),
            "it holds 'step', 'mu_product', 'exp_avg', 'exp_avg_sq' of parameter 0, and not",
        ),
        (lambda p: torch.optim.Adafactor(p), "it holds 'step', .* of parameter 0, and not"),
        (lambda p: torch.optim.Rprop(p), "it holds .*'prev'"),
    ],
)
def test_a_state_dict_of_another_kind_is_refused_and_changes_nothing(make, sentence, delta):
    (model, ours), peer = training(delta), trained()
    theirs = make(peer.parameters())
    run(theirs, peer, 1)
    run(ours, model, 1)
    before, group = snapshot(ours), dict(ours.param_groups[0])
    with pytest.raises(ValueError, match=sentence) as refused:
        ours.load_state_dict(theirs.state_dict())
    assert "saved by another kind of optimizer" in str(refused.value)
    assert "; load one of this optimizer or of torch.optim.AdamW" in str(refused.value)
    assert_same_bits(snapshot(ours), before)
    assert ours.param_groups[0] == group


def test_a_state_dict_of_another_method_is_refused_and_changes_nothing(delta):
    (model, ours), (other, theirs) = training(delta, "onties"), training(delta, "ondare")
    run(theirs, other, 1)
    run(ours, model, 1)
    before, group = snapshot(ours), dict(ours.param_groups[0])
    with pytest.raises(ValueError, match="saved with method 'ondare' and this optimizer has 'onties'; resume with the"):
        ours.load_state_dict(theirs.state_dict())
    assert_same_bits(snapshot(ours), before)
    assert ours.param_groups[0] == group
    # Each group has a method of its own.
    named = list(trained().named_parameters())
    groups = [{"params": named[:3]}, {"params": named[3:], "method": "onties"}]
    mixed = fm.MergingAdamW(groups, reference_delta=delta)
    mixed.load_state_dict(mixed.state_dict())
    saved = mixed.state_dict()
    saved["param_groups"][1]["method"] = "ondare"
    with pytest.raises(ValueError, match="saved with method 'ondare' and this optimizer has 'onties'"):
        mixed.load_state_dict(saved)


def test_a_state_dtype_that_there_is_not_is_refused_and_changes_nothing(delta):
    model, optimizer = training(delta)
    run(optimizer, model, 1)
    before, saved = snapshot(optimizer), optimizer.state_dict()
    saved["param_groups"][0] |= {"state_dtype": "int8", "lr": 1.0}
    with pytest.raises(ValueError, match=r"state_dtype must be torch.float32, .* got int8"):
        optimizer.load_state_dict(saved)
    assert_same_bits(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_a_hook_may_make_a_state_dict_of_another_kind_one_of_adamw(delta):
    (model, ours), peer = training(delta), trained()
    theirs = torch.optim.SGD(peer.parameters(), lr=1e-2, momentum=0.9)
    run(theirs, peer, 1)

    def converted(_, state_dict):
        group = {"params": state_dict["param_groups"][0]["params"]}
        state = {
            index: {"step": torch.tensor(1.0), "exp_avg": buffer, "exp_avg_sq": buffer**2}
            for index, buffer in ((index, entry["momentum_buffer"]) for index, entry in state_dict["state"].items())
        }
        return {"state": state, "param_groups": [group]}

    ours.register_load_state_dict_pre_hook(converted)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[model.head.weight]["exp_avg"], theirs.state[peer.head.weight]["momentum_buffer"])


def test_other_names_are_loaded_by_position_with_a_warning(delta):
    model, optimizer = training(delta)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [f"other.{n}" for n in saved["param_groups"][0]["param_names"]]
    with pytest.warns(UserWarning, match=r"loaded by position: 'other.embed.weight'... .* become 'embed.weight'"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"][0] == "embed.weight"
    run(optimizer, model, 1)


@every_state
def test_every_kind_of_state_survives_a_file_and_goes_on(dtype, options, delta, tmp_path):
    (straight, one), (resumed, two) = (training(delta, dtype=dtype, **options) for _ in range(2))
    run(one, straight, 7)
    run(two, resumed, 4)
    torch.save((resumed.state_dict(), two.state_dict()), tmp_path / "checkpoint.pt")
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = Model(7).to(dtype)
    fresh.load_state_dict(weights)
    # What the constructor was told is overruled by what the run was doing.
    three = optimizer_of(fresh, delta, lr=1.0, reserve_rate=0.9)
    three.load_state_dict(state)
    assert_same(two, three)
    run(three, fresh, 3, first=4)
    assert_same(one, three)


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_keeps_the_dtype_of_its_states(saved_dtype, dtype, delta):
    """Whatever the weights are then: torch would cast every state to their dtype."""
    model, optimizer = training(delta, state_dtype=saved_dtype)
    run(optimizer, model, 2)
    other, resumed = training(delta, dtype=dtype)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[0]["state_dtype"] == saved_dtype
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert resumed.state[q][key].dtype == saved_dtype
            assert torch.equal(resumed.state[q][key], optimizer.state[p][key])
    run(resumed, other, 1, first=2)
    assert resumed.state[other.head.weight]["step"] == 3


@pytest.mark.parametrize("asked", ["bfloat16", torch.bfloat16])
def test_a_state_dict_may_ask_for_other_state_dtypes(asked, delta):
    (model, optimizer), (other, resumed) = (training(delta) for _ in range(2))
    run(optimizer, model, 2)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["state_dtype"] == "float32"
    assert optimizer.param_groups[0]["state_dtype"] == torch.float32
    saved["param_groups"][0]["state_dtype"] = asked
    resumed.load_state_dict(saved)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(resumed.state[q]["exp_avg"], optimizer.state[p]["exp_avg"].bfloat16())
    run(resumed, other, 1, first=2)


def test_a_bf16_state_dict_of_torch_adamw_loads_as_it_is(delta):
    model, peer = trained().bfloat16(), trained().bfloat16()
    theirs = torch.optim.AdamW(peer.parameters(), lr=1e-2, weight_decay=0.0)
    run(theirs, peer, 3)
    model.load_state_dict(peer.state_dict())
    ours = optimizer_of(model, delta, alpha=0.0, reserve_rate=1.0, master="split")
    ours.load_state_dict(theirs.state_dict())
    expected = []
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert theirs.state[q][key].dtype == torch.bfloat16
            assert ours.state[p][key].dtype == torch.float32
            assert torch.equal(ours.state[p][key], theirs.state[q][key].float())
        expected.append([x.detach().double().cpu().numpy() for x in (p, *ours.state[p].values()) if x.ndim])
    run(ours, model, 1, first=3)
    for p, (theta, m, v) in zip(model.parameters(), expected, strict=True):
        g = p.grad.double().cpu().numpy()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta = theta - 1e-2 * m / (1 - 0.9**4) / (np.sqrt(v / (1 - 0.999**4)) + 1e-8)
        master = rounding.join(p.detach(), ours.state[p]["master_low"]).double().cpu().numpy()
        assert np.abs(master - theta).max() <= 1e-6 * np.abs(theta).max()


def test_a_master_that_a_state_dict_lacks_is_made_of_the_weights(delta):
    model = trained().bfloat16()
    theirs = torch.optim.AdamW(model.parameters(), lr=1e-2)
    run(theirs, model, 1)
    ours = optimizer_of(model, delta, lr=0.0, master="fp32", merge_every=2)
    ours.load_state_dict(theirs.state_dict())
    ours.param_groups[0]["lr"] = 0.0
    run(ours, model, 1)
    for p in model.parameters():
        assert torch.equal(ours.state[p]["master"], p.float())
        assert torch.equal(ours.state[p]["anchor"], p.float())


@pytest.mark.parametrize("saved", [{"reserve_rate": 0.5}, {"merge_every": 2}, {"seed": 9}])
def test_a_resumed_run_with_another_tau_is_refused_and_stays_as_it_was(saved, delta):
    model = trained()
    state = optimizer_of(model, delta, **saved).state_dict()
    other = fm.ReferenceDelta.from_models(Model(0), trained(seed=2))
    optimizer = optimizer_of(model, other)
    run(optimizer, model, 1)
    before, group = snapshot(optimizer), dict(optimizer.param_groups[0])
    sentence = (
        f"saved with the reference delta {delta.identity[:12]} .from memory. and this optimizer has.* resume with the "
        "delta that the run began with"
    )
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(state)
    assert_same_bits(snapshot(optimizer), before)
    assert {key: optimizer.param_groups[0][key] for key in saved} == {key: group[key] for key in saved}
    assert optimizer.param_groups[0]["reference"]["identity"] == other.identity


def test_an_adam_whose_decay_is_in_the_gradient_is_refused(delta):
    (model, ours), peer = training(delta), trained()
    theirs = torch.optim.Adam(peer.parameters(), lr=1e-2, weight_decay=0.1)
    run(theirs, peer, 1)
    with pytest.raises(ValueError, match=r"saved by torch\.optim\.Adam, which adds weight_decay to the gradient; set"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state
    # Without a decay the two are one.
    theirs.param_groups[0]["weight_decay"] = 0.0
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[model.head.weight]["exp_avg"], theirs.state[peer.head.weight]["exp_avg"])


def test_hooks_on_loading_have_the_last_word(delta):
    model, saved = training(delta)
    run(saved, model, 2)
    other, optimizer = training(delta, dtype=torch.bfloat16)

    def doubled(_, state_dict):
        state = {
            index: {key: value * 2 if key == "exp_avg" else value for key, value in entry.items()}
            for index, entry in state_dict["state"].items()
        }
        return {**state_dict, "state": state}

    calls = []
    optimizer.register_load_state_dict_pre_hook(doubled)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    for times in (1, 2):
        optimizer.load_state_dict(saved.state_dict())
        assert calls == ["after"] * times
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(optimizer.state[q]["exp_avg"], 2 * saved.state[p]["exp_avg"])
            assert torch.equal(optimizer.state[q]["exp_avg_sq"], saved.state[p]["exp_avg_sq"])
