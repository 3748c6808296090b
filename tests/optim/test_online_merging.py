"""Merges around other optimizers: the equations, what leaves a step unmerged, resume, removal, refusals."""

from __future__ import annotations

import copy
import io
import pickle
from itertools import product

import pytest
import reference
import torch
from bits import assert_same_bits, same_bits
from merged_around import ALPHA, METHODS, assert_merged_by_the_equation, merging_of, sgd_run, weights
from models import IMPLS, Model, fill_gradients, run, trained
from one_tensor import assert_near, delta_of, draw, joined, parameter

import fused_merge as fm

TAU = draw((6, 50), 1e-2, 1, torch.float64)
MERGES = [
    {"method": "ondare", "reserve_rate": 0.3},
    {"method": "ondare", "reserve_rate": 0.3, "rescale": False},
    {"method": "ondare", "reserve_rate": 0.3, "project": "onto", "project_strength": 0.3},
    {"method": "onties", "reserve_rate": 0.3},
    {"method": "onties", "reserve_rate": 0.3, "vote": "paper"},
    {"method": "onproj"},
    {"method": "onproj", "project_over": "rows"},
    {"method": "onsoft", "reserve_rate": 0.3},
]


def muon(pairs):
    return torch.optim.Muon([(name, p) for name, p in pairs if p.ndim == 2], lr=1e-2)


OPTIMIZERS = {
    "Muon": muon,
    "SGD": lambda pairs: torch.optim.SGD(pairs, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "fused AdamW": lambda pairs: torch.optim.AdamW(pairs, lr=1e-2, fused=True),
}


def sgd_of(param, lr=0.5):
    return torch.optim.SGD([("w", param)], lr=lr)


def test_a_merge_by_hand():
    param = parameter([1.0, 2.0, -4.0])
    optimizer = sgd_of(param)
    merging = merging_of(optimizer, delta_of([4.0, 0.0, 8.0]), alpha=0.25, reserve_rate=1.0, merge_every=2)
    param.grad = torch.tensor([1.0, -1.0, 1.0])
    optimizer.step()
    assert param.tolist() == [0.5, 2.5, -4.5]
    param.grad = torch.tensor([1.0, 3.0, -1.0])
    optimizer.step()
    # u = (-1, -1, 0); anchor + 0.75*u + 0.25*tau.
    assert param.tolist() == [1.0 - 0.75 + 1.0, 2.0 - 0.75, -4.0 + 2.0]
    assert merging.state_dict()["state"]["w"]["anchor"].tolist() == param.tolist()


@pytest.mark.parametrize("options", MERGES, ids=joined)
@pytest.mark.parametrize("every", [1, 2, 3])
def test_it_equals_an_independent_calculation(options, every):
    theta = draw((6, 50), dtype=torch.float64)
    param = parameter(theta, torch.float64)
    optimizer = sgd_of(param)
    merging = fm.OnlineMerging(
        optimizer, reference_delta=delta_of(TAU), alpha=ALPHA, merge_every=every, impl="eager", seed=7, **options
    )
    o = merging.options | {"reserve_rate": options.get("reserve_rate", 1.0)}
    o |= {"vote": o["vote"] or "reference", "rescale": o["rescale"] is not False, "project": o["project"]}
    o["project"] = o["project"] or ("conflict" if o["method"] == "onproj" else None)
    expected = reference.Run(theta.numpy(), theta.numpy(), theta.numpy(), 0, TAU.numpy(), "w", **o)
    for number in range(1, 7):
        param.grad = draw((6, 50), seed=number, dtype=torch.float64)
        optimizer.step()
        expected.theta = expected.theta - 0.5 * param.grad.numpy()
        expected.t = number
        if number % every == 0:
            u = expected.projected(expected.theta - expected.anchor, "update")
            expected.theta = expected.anchor + expected.merged(u)
            expected.anchor = expected.theta.copy()
        assert_near(param, expected.theta, 1e-12)


@pytest.mark.parametrize("every", [1, 3])
def test_around_adamw_it_is_the_merging_adamw_up_to_rounding(delta, every):
    shared = {"alpha": ALPHA, "reserve_rate": 0.5, "merge_every": every, "reference_delta": delta, "seed": 3}
    one, two = trained(), trained()
    ours = fm.OnDAREAdamW(one.named_parameters(), lr=1e-2, weight_decay=0.0, **shared)
    theirs = torch.optim.AdamW(two.named_parameters(), lr=1e-2, weight_decay=0.0)
    fm.OnlineMerging(theirs, **shared)
    start = weights(one)
    for optimizer, model in ((ours, one), (theirs, two)):
        run(optimizer, model, 7)
    for name, p in two.named_parameters():
        # Each merge sees theta - anchor, rounded to the last place of theta.
        assert (p - ours_of(one, name)).abs().max() <= 20 * 2.0**-23 * p.abs().max()
        assert (p - start[name]).abs().max() > 1e-2


def ours_of(model, name):
    return dict(model.named_parameters())[name]


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("every", "options"), list(product((1, 3), METHODS)), ids=str)
def test_any_optimizer_is_merged_around_by_the_equation(make, every, options, delta):
    assert_merged_by_the_equation(make, delta, every, options)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["ondare", "onties", "onproj", "onsoft"])
def test_all_backends_give_the_same_bits_and_so_do_two_runs(method, dtype, every, delta):
    found = []
    for impl in (*IMPLS, "eager"):
        model = trained().to(dtype)
        optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2)
        rounding = "stochastic" if dtype == torch.bfloat16 else "nearest"
        merging = merging_of(optimizer, delta, method, merge_every=every, impl=impl, rounding=rounding, stats_every=1)
        run(optimizer, model, 4)
        found.append((weights(model), merging.merge_stats()))
    for other, stats in found[1:]:
        assert_same_bits(found[0][0], other)
        assert found[0][1] == stats
    assert all(entry["norm_u"] > 0 for entry in found[0][1].values())


def test_verify_compares_merges(delta):
    model, optimizer, merging = sgd_run(delta, impl="triton", merge_every=2)
    fm.verify(merging, steps=3)
    run(optimizer, model, 4)
    assert merging.verify_steps == 0
    with pytest.raises(ValueError, match="runs the eager code itself"):
        fm.verify(sgd_run(delta, impl="eager")[2])


def test_at_lr_zero_nothing_merges_and_no_step_counts(delta):
    for zero in (0.0, torch.tensor(0.0)):
        model, optimizer, merging = sgd_run(delta, lr=zero)
        before = weights(model)
        run(optimizer, model, 2)
        assert_same_bits(weights(model), before)
        optimizer.param_groups[0]["lr"] = 1e-2
        run(optimizer, model, 1)
        assert merging.state_dict()["state"]["norm.bias"] == {"step": 1}
        assert not same_bits(model.norm.bias, before["norm.bias"])


def test_a_group_at_lr_zero_stays_as_it_is_while_others_merge(delta):
    model = trained()
    named = list(model.named_parameters())
    optimizer = torch.optim.SGD([{"params": named[:2], "lr": 0.0}, {"params": named[2:], "lr": 1e-2}])
    merging_of(optimizer, delta)
    before = weights(model)
    run(optimizer, model, 1)
    moved = [not same_bits(p, before[name]) for name, p in named]
    assert moved == [False, False] + [True] * (len(named) - 2)


class Scaled(torch.optim.SGD):
    """Skips a step on an overflow itself, as fused optimizers do."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * torch.where(self.found_inf == 0, p.grad / self.grad_scale, 0.0)


@pytest.mark.parametrize("cls", [Scaled, torch.optim.SGD])
def test_an_overflow_is_not_merged(cls, delta):
    model, peer = trained(), trained()
    found = []
    for own, steps in ((model, (0, None, 1)), (peer, (0, 1))):
        optimizer = cls(own.named_parameters(), lr=0.01)
        merging = merging_of(optimizer, delta, merge_every=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for number in steps:
            before = weights(own)
            fill_gradients(own, number or 0)
            for p in own.parameters():
                p.grad *= scaler.get_scale()
            scaler.scale(torch.zeros(()))
            if number is None:
                own.norm.weight.grad[0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            if number is None:
                assert_same_bits(weights(own), before)
        found.append(merging.state_dict()["state"])
    assert_same_bits(weights(model), weights(peer))
    assert found[0]["norm.bias"]["step"] == found[1]["norm.bias"]["step"] == 2


def test_a_closure_decides_which_parameters_have_gradients(delta):
    for every in (1, 2):
        by_closure, before_step = trained(), trained()
        for model, closes in ((by_closure, True), (before_step, False)):
            optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2)
            merging = merging_of(optimizer, delta, merge_every=every)
            for number in range(2):
                optimizer.zero_grad()

                def closure(model=model, number=number):
                    fill_gradients(model, number)
                    model.norm.bias.grad = None
                    return 0.5

                if not closes:
                    closure()
                assert optimizer.step(closure if closes else None) == (0.5 if closes else None)
        assert_same_bits(weights(by_closure), weights(before_step))
        assert same_bits(by_closure.norm.bias, trained().norm.bias)
        assert merging.state_dict()["state"].keys() == weights(before_step).keys() - {"norm.bias"}


def test_several_optimizers_share_a_model_and_a_delta(delta):
    model, peer = trained(), trained()
    named = list(model.named_parameters())
    parts = [torch.optim.SGD(half, lr=1e-2) for half in (named[:3], named[3:])]
    for part in parts:
        merging_of(part, delta)
    whole = torch.optim.SGD(peer.named_parameters(), lr=1e-2)
    merging_of(whole, delta)
    for number in range(3):
        fill_gradients(model, number)
        for part in parts:
            part.step()
    run(whole, peer, 3)
    assert_same_bits(weights(model), weights(peer))


class Outer(torch.optim.SGD):
    """Calls the step of its base class, whose hooks torch calls too once there was an SGD."""

    def step(self, closure=None):
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.5)
        return super().step(closure)


def test_a_step_that_calls_the_one_of_its_base_class_is_merged_once_and_whole(delta):
    model, plain = trained(), trained()
    assert torch.optim.SGD(plain.parameters()).step.__func__.hooked
    optimizer = Outer(model.named_parameters(), lr=1e-2)
    merging = merging_of(optimizer, delta, reserve_rate=1.0)
    before = weights(model)
    run(optimizer, model, 1)
    run(Outer(plain.named_parameters(), lr=1e-2), plain, 1)
    for name, p in model.named_parameters():
        u = dict(plain.named_parameters())[name] - before[name]
        torch.testing.assert_close(p, before[name] + (1 - ALPHA) * u + ALPHA * delta.tensor(name).to(p.device))
    assert merging.state_dict()["state"]["norm.bias"]["step"] == 1


def test_a_step_that_fails_leaves_nothing_behind(delta):
    model, optimizer, merging = sgd_run(delta)
    peer, other, _ = sgd_run(delta)

    def fail():
        raise KeyError("closure")

    with pytest.raises(KeyError):
        optimizer.step(fail)
    with torch.no_grad():
        for p in (*model.parameters(), *peer.parameters()):
            p.add_(1.0)
    for each, own in ((optimizer, model), (other, peer)):
        run(each, own, 1)
    assert_same_bits(weights(model), weights(peer))
    assert merging._pending is None


def test_a_merge_that_cannot_be_done_is_found_before_the_optimizer_has_moved(delta):
    model = Model(0)
    model.extra = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2)
    merging_of(optimizer, delta)
    before = weights(model)
    fill_gradients(model, 0)
    with pytest.raises(ValueError, match=r"the reference delta lacks 'extra\.weight', 'extra\.bias'"):
        optimizer.step()
    assert_same_bits(weights(model), before)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2)
    merging = merging_of(optimizer, delta, missing="plain")
    optimizer.step()
    assert "extra.weight" not in merging.state_dict()["state"]
    assert same_bits(model.extra.bias, before["extra.bias"] - 1e-2 * model.extra.bias.grad)


@pytest.mark.parametrize("end", ["remove", "with"])
def test_it_can_be_removed(end, delta):
    model, optimizer, merging = sgd_run(delta, merge_every=2)
    plain = copy.deepcopy(model)
    if end == "with":
        with merging:
            run(optimizer, model, 3)
    else:
        run(optimizer, model, 3)
        merging.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    plain.load_state_dict(model.state_dict())
    alone = torch.optim.SGD(plain.named_parameters(), lr=1e-2, momentum=0.9)
    alone.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, own in ((optimizer, model), (alone, plain)):
        run(each, own, 2)
    assert_same_bits(weights(model), weights(plain))
    merging_of(optimizer, delta)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("after", [3, 4])
def test_a_run_that_was_saved_goes_on_bit_for_bit(every, after, delta):
    model, optimizer, merging = sgd_run(delta, merge_every=every, seed=5)
    run(optimizer, model, after)
    file = io.BytesIO()
    torch.save([each.state_dict() for each in (model, optimizer, merging)], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    tensors = [x for own in saved[2]["state"].values() for x in own.values() if isinstance(x, torch.Tensor)]
    assert len(tensors) == (0 if every == 1 else len(list(model.parameters())))
    run(optimizer, model, 5, after)
    resumed = sgd_run(delta, merge_every=every, seed=5)
    for each, state in zip(resumed, saved, strict=True):
        each.load_state_dict(state)
    run(resumed[1], resumed[0], 5, after)
    assert_same_bits(weights(model), weights(resumed[0]))


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_copy_goes_on_bit_for_bit(how, delta):
    one = sgd_run(delta, merge_every=3)
    run(one[1], one[0], 4)
    two = pickle.loads(pickle.dumps(one)) if how == "pickle" else copy.deepcopy(one)
    for model, optimizer, _ in (one, two):
        run(optimizer, model, 3, 4)
    assert_same_bits(weights(one[0]), weights(two[0]))
    two[2].remove()
    run(two[1], two[0], 3, 7)
    assert not pickle.loads(pickle.dumps(two))[1]._optimizer_step_pre_hooks


def test_what_a_state_dict_does_not_belong_to_is_refused(delta):
    model, optimizer, merging = sgd_run(delta, merge_every=2)
    run(optimizer, model, 1)
    saved = merging.state_dict()
    other = fm.ReferenceDelta.from_models(Model(0), trained(2))
    with pytest.raises(ValueError, match=r"saved with the reference delta .* resume with the delta that the run began"):
        sgd_run(other)[2].load_state_dict(saved)
    with pytest.raises(ValueError, match="saved with method 'ondare' and this is 'onties'"):
        sgd_run(delta, method="onties")[2].load_state_dict(saved)
    saved["state"]["norm.bias"]["anchor"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"anchor of norm\.bias has shape \(3,\) and the parameter \(16,\)"):
        sgd_run(delta)[2].load_state_dict(saved)
    saved["state"]["elsewhere"] = {"step": 1}
    with pytest.raises(ValueError, match="is of elsewhere, which this optimizer does not step"):
        sgd_run(delta)[2].load_state_dict(saved)


def test_options_change_between_steps_but_not_those_that_states_depend_on(delta):
    model, optimizer, merging = sgd_run(delta)
    run(optimizer, model, 1)
    merging.options["alpha"] = 0.0
    run(optimizer, model, 1, 1)
    merging.options["alpha"] = 2.0
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2.0"):
        run(optimizer, model, 1, 2)
    merging.options |= {"alpha": 0.1, "merge_every": 2}
    with pytest.raises(ValueError, match="merge_every is fixed once a step was merged: it was 1 and is 2"):
        run(optimizer, model, 1, 2)


def test_what_it_cannot_go_around(delta):
    model, optimizer, _ = sgd_run(delta)
    with pytest.raises(ValueError, match=r"merged already; call remove\(\)"):
        merging_of(optimizer, delta)
    with pytest.raises(TypeError, match="OnDAREAdamW merges its own updates; use it alone"):
        merging_of(fm.OnDAREAdamW(model.named_parameters(), reference_delta=delta), delta)
    with pytest.raises(TypeError, match=r"goes around a torch\.optim\.Optimizer, got a Model"):
        merging_of(model, delta)
    fresh = torch.optim.SGD(model.named_parameters(), lr=1e-2)
    with pytest.raises(ValueError, match="project_on must be 'update', got 'gradient'"):
        merging_of(fresh, delta, project_on="gradient")
    with pytest.raises(TypeError, match="no option 'weight_decay'"):
        merging_of(fresh, delta, weight_decay=0.1)
    with pytest.raises(ValueError, match="no option 'vote'"):
        merging_of(fresh, delta, vote="paper")


def test_a_learning_rate_schedule_goes_on(delta):
    model, optimizer, _ = sgd_run(delta)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.0 + 1e-9, 1.0, 3)
    before = weights(model)
    for number in range(3):
        run(optimizer, model, 1, number)
        schedule.step()
    assert all(not same_bits(p, before[name]) for name, p in model.named_parameters())


def test_names_come_from_the_model_where_the_optimizer_has_none(delta):
    model, peer = trained(), trained()
    optimizer = torch.optim.SGD(list(model.parameters())[::-1], lr=1e-2)
    merging = merging_of(optimizer, delta, names_of=model)
    run(optimizer, model, 1)
    # The groups are the optimizer's: they are not written to.
    assert "param_names" not in optimizer.param_groups[0]
    model, optimizer, _ = copy.deepcopy((model, optimizer, merging))
    run(optimizer, model, 2, 1)
    other = torch.optim.SGD(peer.named_parameters(), lr=1e-2)
    merging_of(other, delta)
    run(other, peer, 3)
    assert_same_bits(weights(model), weights(peer))


def test_parameters_that_a_framework_has_replaced_by_flat_ones_are_refused(delta):
    model, optimizer, _ = sgd_run(delta)
    flat = torch.nn.Parameter(torch.cat([p.detach().flatten() for p in model.parameters()]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match=r"steps 1 tensors under the names of 6: .* with set_pieces\(\)"):
        optimizer.step()
    assert same_bits(flat, torch.cat([p.detach().flatten() for p in model.parameters()]))


def test_a_step_without_gradients_warns_once(delta, caplog):
    _, optimizer, _ = sgd_run(delta)
    for _ in range(2):
        optimizer.step()
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "no parameter of this optimizer has a gradient"
    ]
