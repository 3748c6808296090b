"""The contracts of `torch.optim.Optimizer`, and what names, states and bad input mean."""

from __future__ import annotations

import copy
import logging
import warnings

import numpy as np
import pytest
import reference
import torch
from conftest import DEVICE
from torch import nn

import fused_merge as fm

CLASSES = [fm.OnDAREAdamW, fm.OnTIESAdamW]


class Model(nn.Module):
    def __init__(self, seed: int = 0, head: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        if head:
            self.head = nn.Linear(16, 3, bias=False)
        self.to(DEVICE)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.hidden(self.embed(tokens)))))


def trained(seed: int = 1) -> nn.Module:
    """A model near `Model(0)`, as after fine-tuning."""
    model = Model(0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


@pytest.fixture
def delta() -> fm.ReferenceDelta:
    return fm.ReferenceDelta.from_models(Model(0), trained())


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def run(optimizer, model, steps, first=0):
    for step in range(first, first + steps):
        fill_gradients(model, step)
        optimizer.step()


def assert_same(a, b):
    """Same bits in parameters and in every state tensor."""
    for group_a, group_b in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(group_a["params"], group_b["params"], strict=True):
            assert torch.equal(p, q)
            assert a.state[p].keys() == b.state[q].keys()
            for key in a.state[p]:
                assert a.state[p][key].dtype == b.state[q][key].dtype
                assert torch.equal(a.state[p][key], b.state[q][key])


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (fm.OnDAREAdamW, {"reserve_rate": 0.3}),
        (fm.OnDAREAdamW, {"reserve_rate": 0.3, "rescale": False}),
        (fm.OnTIESAdamW, {"reserve_rate": 0.3}),
        (fm.OnTIESAdamW, {"reserve_rate": 0.3, "vote": "paper"}),
    ],
)
def test_from_names_to_weights_it_equals_an_independent_calculation(cls, options, delta):
    model = trained()
    hyper = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.01, "seed": 5}
    optimizer = cls(model.named_parameters(), reference_delta=delta, **hyper, **options)
    # The first step of Adam has |u| = lr everywhere: what is top then is decided by rounding, so all stays.
    optimizer.param_groups[0]["reserve_rate"] = 1.0 if cls is fm.OnTIESAdamW else options["reserve_rate"]
    method = "onties" if cls is fm.OnTIESAdamW else "ondare"
    expected = {}
    for name, p in model.named_parameters():
        theta, tau = (x.detach().double().cpu().numpy().reshape(-1) for x in (p, delta.tensor(name)))
        zeros = np.zeros_like(theta)
        expected[name] = reference.Run(theta, zeros, zeros, 0, tau, name, method=method, **hyper, **options)
        expected[name].o["reserve_rate"] = optimizer.param_groups[0]["reserve_rate"]
    for step in range(4):
        fill_gradients(model, step)
        for name, p in model.named_parameters():
            expected[name].step(p.grad.cpu().double().numpy().reshape(-1))
        optimizer.step()
    for name, p in model.named_parameters():
        ours, theirs = p.detach().cpu().double().numpy().reshape(-1), expected[name].theta
        assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


def test_without_merging_it_is_torch_adamw(delta):
    model, peer = trained(), trained()
    options = {"lr": 1e-2, "weight_decay": 0.1}
    ours = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, alpha=0.0, reserve_rate=1.0, **options)
    theirs = torch.optim.AdamW(peer.parameters(), **options)
    for step in range(20):
        fill_gradients(model, step)
        fill_gradients(peer, step)
        ours.step()
        theirs.step()
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        assert (p - q).abs().max() <= 1e-6 * q.abs().max()


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


def test_wrapped_names_are_the_same_names(delta):
    plain, wrapped = trained(), nn.ModuleDict({"module": trained()})
    one = fm.OnDAREAdamW(plain.named_parameters(), reference_delta=delta, reserve_rate=0.5)
    two = fm.OnDAREAdamW(wrapped.named_parameters(), reference_delta=delta, reserve_rate=0.5)
    assert two.param_groups[0]["param_names"][0] == "module.embed.weight"
    run(one, plain, 2)
    run(two, wrapped, 2)
    assert_same(one, two)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two.load_state_dict(one.state_dict())


def test_unnamed_parameters_are_bound_in_the_models_order(delta):
    named, unnamed = trained(), trained()
    one = fm.OnDAREAdamW(named.named_parameters(), reference_delta=delta, reserve_rate=0.5)
    two = fm.OnDAREAdamW(unnamed.parameters(), reference_delta=delta, reserve_rate=0.5)
    run(one, named, 2)
    run(two, unnamed, 2)
    assert_same(one, two)


def test_unnamed_parameters_that_do_not_fit_are_refused(delta):
    model = trained()
    few = fm.OnDAREAdamW(list(model.parameters())[1:], reference_delta=delta)
    with pytest.raises(ValueError, match=r"5 unnamed parameters do not match the 6 tensors .* model.named_parameters"):
        few.bind()


def test_unnamed_parameters_are_refused_by_a_delta_of_files(tmp_path):
    from safetensors.torch import save_file

    model = trained().cpu()
    save_file(Model(0).cpu().state_dict(), tmp_path / "base.safetensors")
    save_file(model.state_dict(), tmp_path / "sft.safetensors")
    delta = fm.ReferenceDelta.from_checkpoints(tmp_path / "base.safetensors", tmp_path / "sft.safetensors")
    optimizer = fm.OnDAREAdamW(model.parameters(), reference_delta=delta)
    with pytest.raises(ValueError, match=r"does not know its model's order of parameters; pass model.named_parameters"):
        optimizer.bind()


def test_order_and_grouping_of_parameters_do_not_show(delta):
    straight, shuffled = trained(), trained()
    options = {"reference_delta": delta, "reserve_rate": 0.5, "lr": 1e-2}
    one = fm.OnDAREAdamW(straight.named_parameters(), **options)
    pairs = list(shuffled.named_parameters())[::-1]
    two = fm.OnDAREAdamW([{"params": pairs[:2]}, {"params": pairs[2:]}], **options)
    run(one, straight, 3)
    run(two, shuffled, 3)
    for (name, p), (other, q) in zip(straight.named_parameters(), shuffled.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p, q)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_saved_delta_by_path_gives_the_same_run(cls, delta, tmp_path):
    method = {fm.OnDAREAdamW: "random", fm.OnTIESAdamW: "magnitude"}[cls]
    delta.save(tmp_path / "dense.safetensors")
    delta.save(tmp_path / "sparse.safetensors", reserve_rate=0.5, method=method, seed=3)
    runs = []
    for source in (delta, tmp_path / "dense.safetensors", str(tmp_path / "sparse.safetensors")):
        model = trained()
        optimizer = cls(model.named_parameters(), reference_delta=source, reserve_rate=0.5, seed=3, lr=1e-2)
        run(optimizer, model, 2)
        runs.append(optimizer)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    # All three are one delta: a run may be resumed with any of them.
    runs[2].load_state_dict(runs[0].state_dict())


@pytest.mark.parametrize("asked", [{"reserve_rate": 0.25}, {"reserve_rate": 1.0}, {"reserve_rate": 0.5, "seed": 4}])
def test_a_sparse_delta_must_match_what_is_asked_for(asked, delta, tmp_path):
    path = delta.save(tmp_path / "sparse.safetensors", reserve_rate=0.5, method="random", seed=3)
    optimizer = fm.OnDAREAdamW(trained().named_parameters(), reference_delta=path, **{"seed": 3} | asked)
    with pytest.raises(ValueError, match=r"was saved with method='random', reserve_rate=0.5, seed=3"):
        optimizer.bind()


def test_a_later_reserve_rate_acts_on_the_update_only(delta):
    model, resumed = trained(), trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, reserve_rate=0.5, lr=1e-2)
    run(optimizer, model, 1)
    def kept_of(optimizer):
        return {name: optimizer._binding.of(name, DEVICE).kept.unpack() for name in delta.names}

    kept = kept_of(optimizer)
    optimizer.param_groups[0]["reserve_rate"] = 0.1
    run(optimizer, model, 1, first=1)
    # The same after a resume, where tau is sparsified anew.
    other = fm.OnDAREAdamW(resumed.named_parameters(), reference_delta=delta)
    other.load_state_dict(optimizer.state_dict())
    other.bind()
    for name, tau in kept.items():
        assert torch.equal(kept_of(optimizer)[name], tau)
        assert torch.equal(kept_of(other)[name], tau)


def test_a_missing_parameter_is_named(delta):
    model = trained()
    model.value_head = nn.Linear(16, 1).to(DEVICE)
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
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
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, missing="plain", lr=1e-2)
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
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    with pytest.raises(ValueError, match=r"'head.weight' has shape \(4, 16\) and its reference delta \(3, 16\)"):
        optimizer.bind()


def test_parameters_without_gradient_rest(delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, alpha=0.5, reserve_rate=1.0)
    fill_gradients(model, 0)
    model.head.weight.grad = None
    before = model.head.weight.clone()
    optimizer.step()
    assert torch.equal(model.head.weight, before)
    assert model.head.weight not in optimizer.state
    fill_gradients(model, 1)
    optimizer.step()
    # Its own count: Adam's bias correction and the masks begin with its first step.
    assert optimizer.state[model.head.weight]["step"] == 1
    assert optimizer.state[model.embed.weight]["step"] == 2


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
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    run(optimizer, model, 1)
    assert optimizer.state[model.embed.weight]["step"] == 1


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


def test_schedulers_and_changed_options_act_on_the_next_step(delta):
    model, peer = trained(), trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    by_hand = fm.OnDAREAdamW(peer.named_parameters(), reference_delta=delta, lr=1e-2)
    for step in range(3):
        run(optimizer, model, 1, first=step)
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 1e-2 * 0.5**step
        run(by_hand, peer, 1, first=step)
    assert_same(optimizer, by_hand)


def test_a_closure_sees_gradients_and_returns_its_loss(delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, lr=1e-2)
    tokens = torch.tensor([1, 2, 3], device=DEVICE)

    def closure():
        optimizer.zero_grad()
        loss = model(tokens).square().sum()
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() != before


def test_step_hooks_fire(delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    run(optimizer, model, 1)
    assert calls == ["before", "after"]


def test_a_group_may_be_added_later(delta):
    model = trained()
    named = list(model.named_parameters())
    optimizer = fm.OnDAREAdamW(named[:3], reference_delta=delta)
    run(optimizer, model, 1)
    optimizer.add_param_group({"params": named[3:], "alpha": 0.25})
    run(optimizer, model, 1, first=1)
    assert optimizer.state[model.head.weight]["step"] == 1
    assert optimizer.param_groups[1]["reference"]["identity"] == delta.identity
    with pytest.raises(ValueError, match="alpha must lie in"):
        optimizer.add_param_group({"params": [("x", nn.Parameter(torch.zeros(2)))], "alpha": 2.0})
    assert len(optimizer.param_groups) == 2


def test_permuted_and_tiny_parameters(delta):
    def model_of(permuted):
        model = trained()
        weight = model.hidden.weight
        if permuted:
            model.hidden.weight = nn.Parameter(weight.detach().t().contiguous().t())
        model.scalar = nn.Parameter(torch.tensor(2.0, device=DEVICE))
        model.empty = nn.Parameter(torch.zeros(0, 4, device=DEVICE))
        return model

    delta = fm.ReferenceDelta.from_models(model_of(False), model_of(False))
    one_model, two_model = model_of(False), model_of(True)
    one = fm.OnTIESAdamW(one_model.named_parameters(), reference_delta=delta, reserve_rate=0.5, lr=1e-2)
    two = fm.OnTIESAdamW(two_model.named_parameters(), reference_delta=delta, reserve_rate=0.5, lr=1e-2)
    run(one, one_model, 2)
    run(two, two_model, 2)
    assert_same(one, two)
    assert two_model.hidden.weight.stride() == (1, 16)


def test_sparse_gradients_are_refused_and_nothing_moves(delta):
    model = trained()
    model.embed.sparse = True
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    model(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the gradient of 'embed.weight' is sparse .* nn.Embedding\(sparse=False\)"):
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not optimizer.state


def test_complex_parameters_are_refused(delta):
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    parameter.grad = torch.ones_like(parameter)
    optimizer = fm.OnDAREAdamW([("rotation", parameter)], reference_delta=delta, missing="plain")
    with pytest.raises(ValueError, match=r"'rotation' is torch.complex64; only real floating parameters"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, r"a tensor lr must hold one number, got shape \(2,\)"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must lie in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must lie in \[0, 1\), got -0.1"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, r"alpha must lie in \[0, 1\], got nan"),
        ({"reserve_rate": 0.0}, r"reserve_rate must lie in \(0, 1\], got 0.0"),
        ({"missing": "skip"}, "missing must be 'error' or 'plain', got 'skip'"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"method": "dare"}, "unknown method 'dare'"),
        ({"vote": "paper"}, "method 'ondare' has no option 'vote'"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence, delta):
    with pytest.raises(ValueError, match=sentence):
        fm.MergingAdamW(trained().named_parameters(), reference_delta=delta, **options)


def test_an_option_that_a_class_lacks_is_refused(delta):
    with pytest.raises(ValueError, match="method 'onties' has no option 'rescale'"):
        fm.MergingAdamW(trained().named_parameters(), reference_delta=delta, method="onties", rescale=False)
    with pytest.raises(TypeError, match="gamma"):
        fm.OnDAREAdamW(trained().named_parameters(), reference_delta=delta, gamma=1)


def test_the_general_form_is_its_subclasses(delta):
    for cls, method in ((fm.OnDAREAdamW, "ondare"), (fm.OnTIESAdamW, "onties")):
        one_model, two_model = trained(), trained()
        one = cls(one_model.named_parameters(), reference_delta=delta, reserve_rate=0.5)
        two = fm.MergingAdamW(two_model.named_parameters(), reference_delta=delta, reserve_rate=0.5, method=method)
        run(one, one_model, 2)
        run(two, two_model, 2)
        assert_same(one, two)


def test_only_what_drops_anything_is_held_sparse(delta):
    model = trained()
    sparse = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, reserve_rate=0.01)
    dense = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta, reserve_rate=1.0)
    sparse.bind()
    dense.bind()
    for name in delta.names:
        assert isinstance(sparse._binding.of(name, DEVICE).kept, fm.sparse.SparseTensor)
        assert isinstance(dense._binding.of(name, DEVICE).kept, torch.Tensor)


def test_the_delta_follows_a_moved_parameter(delta):
    model = trained()
    optimizer = fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta)
    optimizer.bind()
    elsewhere = torch.device("meta")
    assert optimizer._binding.of("head.weight", elsewhere).kept.device == elsewhere
