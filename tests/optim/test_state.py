"""What an optimizer keeps: state dicts, resumed runs, DCP, copies, devices."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from device import DEVICE
from models import IMPLS, Model, assert_same, fill_gradients, optimizer_of, run, trained
from torch import nn

import fused_merge as fm
from fused_merge.eager import rounding
from fused_merge.eager.sparse import SparseTensor
from fused_merge.optim import merging_adamw

CLASSES = [fm.OnDAREAdamW, fm.OnTIESAdamW]


@pytest.fixture
def delta() -> fm.ReferenceDelta:
    return fm.ReferenceDelta.from_models(Model(0), trained())


@pytest.mark.parametrize("cls", CLASSES)
def test_state_holds_three_tensors_and_no_delta(cls, delta):
    model = trained()
    optimizer = cls(model.named_parameters(), reference_delta=delta)
    run(optimizer, model, 1)
    for p in model.parameters():
        state = optimizer.state[p]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"].shape == ()
        assert state["step"].dtype == state["exp_avg"].dtype == torch.float32
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_weights_have_fp32_moments(dtype, delta):
    model = trained().to(dtype)
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-2)
    run(optimizer, model, 2)
    assert all(p.dtype == dtype for p in model.parameters())
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_state_dict_there_and_back_is_the_same_run(cls, dtype, delta, tmp_path):
    straight, resumed = trained().to(dtype), trained().to(dtype)
    options = {"reference_delta": delta, "lr": 1e-2, "reserve_rate": 0.5, "alpha": 1e-3}
    one, two = (cls(model.named_parameters(), **options) for model in (straight, resumed))
    run(one, straight, 5)
    run(two, resumed, 3)
    torch.save({"model": resumed.state_dict(), "optimizer": two.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = Model(7).to(dtype)
    fresh.load_state_dict(saved["model"])
    # What the constructor was told is overruled by what the run was doing.
    three = cls(fresh.named_parameters(), reference_delta=delta, lr=1.0, reserve_rate=0.9)
    three.load_state_dict(saved["optimizer"])
    assert_same(two, three)
    run(three, fresh, 2, first=3)
    assert_same(one, three)


def test_a_loaded_state_is_not_shared(delta):
    model, other = trained(), trained()
    one = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    run(one, model, 1)
    two = fm.OnDAREAdamW(other.named_parameters(), reference_delta=delta)
    two.load_state_dict(one.state_dict())
    before = [one.state[p]["exp_avg"].clone() for p in model.parameters()]
    run(two, other, 1)
    for p, m in zip(model.parameters(), before, strict=True):
        assert torch.equal(one.state[p]["exp_avg"], m)


def test_a_run_goes_on_in_the_other_backend(delta):
    one_model, two_model = trained(), trained()
    options = {"reference_delta": delta, "lr": 1e-2, "reserve_rate": 0.5}
    one = fm.OnDAREAdamW(one_model.named_parameters(), impl="eager", **options)
    two = fm.OnDAREAdamW(two_model.named_parameters(), impl="triton", **options)
    run(one, one_model, 2)
    run(two, two_model, 2)
    assert_same(one, two)
    two.load_state_dict(one.state_dict())
    run(one, one_model, 2, first=2)
    run(two, two_model, 2, first=2)
    assert_same(one, two)


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


@pytest.mark.parametrize("option", ["amsgrad"])
def test_an_adamw_that_computes_something_else_is_refused(option, delta):
    model, peer = trained(), trained()
    theirs = torch.optim.AdamW(peer.parameters(), **{option: True})
    ours = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    with pytest.raises(ValueError, match=f"saved with {option}=True, which this optimizer lacks"):
        ours.load_state_dict(theirs.state_dict())


def test_another_delta_is_refused_on_resume(delta):
    model = trained()
    saved = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta).state_dict()
    other = fm.ReferenceDelta.from_models(Model(0), trained(seed=2))
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=other, lr=0.5)
    sentence = f"saved with the reference delta {delta.identity[:12]} .from memory. and this optimizer has"
    with pytest.raises(ValueError, match=sentence):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_other_names_are_loaded_by_position_with_a_warning(delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = [f"other.{n}" for n in saved["param_groups"][0]["param_names"]]
    with pytest.warns(UserWarning, match=r"loaded by position: 'other.embed.weight'... .* become 'embed.weight'"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["param_names"][0] == "embed.weight"
    run(optimizer, model, 1)


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_the_probe_of_a_state_dict_moves_no_weight(lr, delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=lr, alpha=0.5)
    before = copy.deepcopy(model.state_dict())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(optimizer.state[p]["step"] == 1 for p in model.parameters())


def test_distributed_checkpoint_reads_and_writes_the_state(delta):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = trained(), trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-2)
    run(optimizer, model, 2)
    saved = get_optimizer_state_dict(model, optimizer)
    before = copy.deepcopy(other.state_dict())
    fresh = fm.OnDAREAdamW(other.named_parameters(), reference_delta=delta, lr=1e-2)
    set_optimizer_state_dict(other, fresh, saved)
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    other.load_state_dict(model.state_dict())
    run(optimizer, model, 1, first=2)
    run(fresh, other, 1, first=2)
    assert_same(optimizer, fresh)


def test_the_delta_follows_a_moved_parameter(delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    optimizer.bind()
    elsewhere = torch.device("meta")
    assert optimizer._binding.of("head.weight", elsewhere).tau.device == elsewhere


# Every kind of state: moments, masters of both kinds, anchors.
STATEFUL = [
    (torch.float32, {}),
    (torch.float32, {"merge_every": 3, "weight_decay": 0.1}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master": "fp32", "merge_every": 3}),
    (torch.bfloat16, {"master": "split", "merge_every": 3}),
    (torch.bfloat16, {"rounding": "stochastic", "merge_every": 3}),
    (torch.float16, {"master": "fp32", "state_dtype": torch.float16}),
    (torch.float64, {"merge_every": 3, "state_dtype": torch.bfloat16}),
]
every_state = pytest.mark.parametrize(
    ("dtype", "options"), STATEFUL, ids=lambda value: str(value).removeprefix("torch.") if value else "plain"
)


def unpickled(pair):
    return pickle.loads(pickle.dumps(pair))


def snapshot(optimizer):
    """Every bit that an optimizer owns: parameters and states."""
    return [
        (p.detach().clone(), {key: value.clone() for key, value in optimizer.state[p].items()})
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_unmoved(optimizer, before):
    after = snapshot(optimizer)
    assert len(after) == len(before)
    for (p, state), (old_p, old_state) in zip(after, before, strict=True):
        assert torch.equal(p, old_p)
        assert state.keys() == old_state.keys()
        assert all(torch.equal(state[key], old_state[key]) for key in state)


@every_state
def test_every_kind_of_state_survives_a_file_and_goes_on(dtype, options, delta, tmp_path):
    straight, resumed = trained().to(dtype), trained().to(dtype)
    one, two = (optimizer_of(model, delta, **options) for model in (straight, resumed))
    run(one, straight, 7)
    run(two, resumed, 4)
    torch.save((resumed.state_dict(), two.state_dict()), tmp_path / "checkpoint.pt")
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    fresh = Model(7).to(dtype)
    fresh.load_state_dict(weights)
    three = optimizer_of(fresh, delta)
    three.load_state_dict(state)
    assert_same(two, three)
    run(three, fresh, 3, first=4)
    assert_same(one, three)


@every_state
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_keeps_every_bit_in_a_folder(dtype, options, delta, tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    straight, resumed = trained().to(dtype), trained().to(dtype)
    one, two = (optimizer_of(model, delta, **options) for model in (straight, resumed))
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

    model, other = trained().to(dtype), trained().to(dtype)
    one, two = (optimizer_of(m, delta, **options) for m in (model, other))
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
    model = trained().to(dtype)
    optimizer = optimizer_of(model, delta, **options)
    run(optimizer, model, 4)
    # Model and optimizer together: the copy's parameters are those of the copied model.
    twin_model, twin = copied((model, optimizer))
    assert twin.param_groups[0]["params"][0] is twin_model.embed.weight
    assert twin_model.embed.weight is not model.embed.weight
    assert_same(optimizer, twin)
    run(twin, twin_model, 3, first=4)
    untouched = snapshot(optimizer)
    run(twin, twin_model, 1, first=7)
    assert_unmoved(optimizer, untouched)
    run(optimizer, model, 4, first=4)
    assert_same(optimizer, twin)


def test_a_copy_keeps_hyper_parameters_and_what_is_fixed(delta):
    model = trained()
    optimizer = optimizer_of(model, delta, impl="eager", stats_every=1, max_grad_norm=1.0, seed=3)
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
    assert_unmoved(optimizer, before)
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


@pytest.mark.parametrize("saved_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_keeps_the_dtype_of_its_states(saved_dtype, dtype, delta):
    """Whatever the weights are then: torch would cast every state to their dtype."""
    model, other = trained(), trained().to(dtype)
    optimizer = optimizer_of(model, delta, state_dtype=saved_dtype)
    run(optimizer, model, 2)
    resumed = optimizer_of(other, delta)
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
    model, other = trained(), trained()
    optimizer = optimizer_of(model, delta)
    run(optimizer, model, 2)
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["state_dtype"] == "float32"
    assert optimizer.param_groups[0]["state_dtype"] == torch.float32
    saved["param_groups"][0]["state_dtype"] = asked
    resumed = optimizer_of(other, delta)
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
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="resume with the delta that the run began with"):
        optimizer.load_state_dict(state)
    assert_unmoved(optimizer, before)
    assert optimizer.param_groups[0]["reference"]["identity"] == other.identity


@pytest.mark.parametrize("options", [{}, {"merge_every": 3}, {"master": "split"}, {"project": "conflict"}])
def test_delta_and_states_follow_a_moved_parameter(options, delta, monkeypatch):
    """The meta device stands for another one: it has no data and nothing may be read there."""
    model = trained().to(torch.bfloat16 if "master" in options else torch.float32)
    optimizer = optimizer_of(model, delta, **options)
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
        return [None]

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
    model = trained().to(dtype)
    options = options | {"impl": impl, "max_grad_norm": None if impl == "triton" else 1.0}
    optimizer = optimizer_of(model, delta, **options)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**4)
    scaler.scale(torch.ones((), device=DEVICE))
    run(optimizer, model, 2)
    before = snapshot(optimizer)
    fill_gradients(model, 2)
    # One element of one tensor stops all of them.
    model.norm.bias.grad[3] = bad
    scaler.step(optimizer)
    scaler.update()
    assert_unmoved(optimizer, before)
    assert scaler.get_scale() == 2.0**3
    # And the next step is the one that was not taken.
    straight = trained().to(dtype)
    other = optimizer_of(straight, delta, **options)
    run(other, straight, 3)
    run(optimizer, model, 1, first=2)
    assert_same(optimizer, other)


@pytest.mark.parametrize("impl", IMPLS)
def test_an_overflow_in_the_very_first_step_leaves_step_zero(impl, delta):
    model, straight = trained(), trained()
    optimizer, other = (optimizer_of(m, delta, impl=impl) for m in (model, straight))
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0)
    scaler.scale(torch.ones((), device=DEVICE))
    fill_gradients(model, 0)
    model.embed.weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    assert all(optimizer.state[p]["step"] == 0 for p in model.parameters())
    run(optimizer, model, 2)
    run(other, straight, 2)
    assert_same(optimizer, other)


def test_an_adam_whose_decay_is_in_the_gradient_is_refused(delta):
    model, peer = trained(), trained()
    theirs = torch.optim.Adam(peer.parameters(), lr=1e-2, weight_decay=0.1)
    run(theirs, peer, 1)
    ours = optimizer_of(model, delta)
    with pytest.raises(ValueError, match=r"saved by torch\.optim\.Adam, which adds weight_decay to the gradient; set"):
        ours.load_state_dict(theirs.state_dict())
    assert not ours.state
    # Without a decay the two are one.
    theirs.param_groups[0]["weight_decay"] = 0.0
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state[model.head.weight]["exp_avg"], theirs.state[peer.head.weight]["exp_avg"])


def test_hooks_on_loading_have_the_last_word(delta):
    model, other = trained(), trained().bfloat16()
    saved = optimizer_of(model, delta)
    run(saved, model, 2)
    optimizer = optimizer_of(other, delta)

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
