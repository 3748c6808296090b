"""Steps that are taken again as they were prepared, and all that must be noticed in between. On a CPU only."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from device import DEVICE
from models import Model, assert_same, fill_gradients, optimizer_of, run, snapshot, trained, training
from torch import nn

import fused_merge as fm
from fused_merge.optim import merging_adamw
from fused_merge.optim.pieces import Piece

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="compiled code is for the CPU")


@pytest.fixture
def prepared(monkeypatch):
    """The implementation of each step of a group that was prepared from the beginning."""
    calls = []

    def counted(operands, **options):
        calls.append(options["impl"])
        return prepare(operands, **options)

    prepare = merging_adamw.prepare
    monkeypatch.setattr(merging_adamw, "prepare", counted)
    return calls


def assert_goes_on_like_a_fresh_one(model, optimizer, first=10):
    """What an optimizer made of the same states does by eager code in three steps, this one does."""
    peer, fresh = copy.deepcopy((model, optimizer))
    fresh.impl = "eager"
    for one, other in ((optimizer, model), (fresh, peer)):
        run(one, other, 3, first)
    assert_same(optimizer, fresh)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ondare", {}),
        ("ondare", {"merge_every": 2, "weight_decay": 0.1}),
        ("ondare", {"dtype": torch.bfloat16, "master": "split", "merge_every": 3}),
        ("ondare", {"dtype": torch.bfloat16, "rounding": "stochastic"}),
        ("onties", {"max_grad_norm": 0.5, "maximize": True}),
        ("onproj", {"project_on": "update"}),
    ],
)
def test_only_the_first_of_some_steps_is_prepared(method, options, delta, prepared):
    model, optimizer = training(delta, method, impl="compiled", **options)
    run(optimizer, model, 4)
    assert len(prepared) == 1
    peer, eager = training(delta, method, impl="eager", **options)
    run(eager, peer, 4)
    assert_same(optimizer, eager)


def _loads(model, optimizer):
    earlier = copy.deepcopy(optimizer.state_dict())
    run(optimizer, model, 2, first=20)
    optimizer.load_state_dict(earlier)


def _loads_in_place(model, optimizer):
    """As a framework does, which writes into what there is."""
    for p in model.parameters():
        optimizer.state[p]["exp_avg"].mul_(2)
        optimizer.state[p]["step"].fill_(7)


def _replaces(key):
    def replace(model, optimizer):
        state = optimizer.state[model.hidden.weight]
        state[key] = state[key].clone() + 1

    return replace


def _narrows_a_state(model, optimizer):
    state = optimizer.state[model.hidden.weight]
    state["exp_avg"] = state["exp_avg"].bfloat16()


def _drops_states(model, optimizer):
    optimizer.state.clear()


def _drops_a_state(model, optimizer):
    del optimizer.state[model.hidden.weight]


def _moves(model, optimizer):
    for p in model.parameters():
        p.data = p.data.clone()


def _becomes_narrow(model, optimizer):
    model.bfloat16()


def _sets(**options):
    def set_options(model, optimizer):
        optimizer.param_groups[0] |= options

    return set_options


def _replaces_groups(model, optimizer):
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups[0]["lr"] = 0.1


def _renames(model, optimizer):
    # As ZeroRedundancyOptimizer does, which copies the values of groups.
    names = optimizer.param_groups[0]["param_names"]
    i, j = names.index("norm.weight"), names.index("norm.bias")
    names[i], names[j] = names[j], names[i]


def _replaces_parameters(model, optimizer):
    """As a framework may: what lies in memory stays there, in other objects."""
    group = optimizer.param_groups[0]
    for i, p in enumerate(group["params"]):
        group["params"][i] = nn.Parameter(p.detach())
        optimizer.state[group["params"][i]] = optimizer.state.pop(p)
    for path, p in zip(group["param_names"], group["params"], strict=True):
        module, name = path.split(".")
        setattr(model.get_submodule(module), name, p)


def _swaps_states(model, optimizer):
    step, exp_avg, exp_avg_sq = optimizer.state[model.head.weight].values()
    optimizer.state[model.head.weight] = {"step": step, "exp_avg_sq": exp_avg.abs_(), "exp_avg": exp_avg_sq}


def _reshapes_a_state(model, optimizer):
    state = optimizer.state[model.hidden.weight]
    state["exp_avg"].data = state["exp_avg"].t().contiguous().t()


def _uses_more_threads(model, optimizer):
    torch.set_num_threads(torch.get_num_threads() + 1)


def _reorders(model, optimizer):
    group = optimizer.param_groups[0]
    group["params"], group["param_names"] = group["params"][::-1], group["param_names"][::-1]


CHANGES = {
    "nothing": lambda *_: None,
    "load_state_dict": _loads,
    "states in place": _loads_in_place,
    "exp_avg": _replaces("exp_avg"),
    "exp_avg_sq": _replaces("exp_avg_sq"),
    "step": _replaces("step"),
    "dtype of a state": _narrows_a_state,
    "a state gone": _drops_a_state,
    "all states gone": _drops_states,
    "weights elsewhere": _moves,
    "dtype of the weights": _becomes_narrow,
    "lr": _sets(lr=0.1),
    "tensor lr": _sets(lr=torch.tensor(0.1)),
    "lr 0": _sets(lr=0.0),
    "alpha": _sets(alpha=0.5),
    "betas": _sets(betas=[0.5, 0.5], eps=1e-3),
    "weight decay": _sets(weight_decay=0.1),
    "maximize": _sets(maximize=True),
    "clipping": _sets(max_grad_norm=0.1),
    "reserve_rate": _sets(reserve_rate=0.9),
    "projection": _sets(project="conflict"),
    "rounding": _sets(rounding="stochastic"),
    "groups": _replaces_groups,
    "names": _renames,
    "order": _reorders,
    "parameters": _replaces_parameters,
    "states": _swaps_states,
    "threads": _uses_more_threads,
}


@pytest.mark.parametrize("method", ["ondare", "onties"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_two_steps_is_noticed(change, method, delta):
    threads = torch.get_num_threads()
    # A dense delta, which may be projected onto.
    model, optimizer = training(delta, method, impl="compiled", reserve_rate=1.0)
    optimizer.param_groups[0]["reserve_rate"] = 0.5
    run(optimizer, model, 3)
    CHANGES[change](model, optimizer)
    try:
        assert_goes_on_like_a_fresh_one(model, optimizer)
    finally:
        torch.set_num_threads(threads)


def test_what_says_nothing_of_tensors_needs_no_preparation(delta, prepared):
    model, optimizer = training(delta, impl="compiled")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=True)
    run(optimizer, model, 2)
    for change in ("states in place", "alpha", "maximize", "clipping", "lr", "betas"):
        CHANGES[change](model, optimizer)
        schedule.step()
        run(optimizer, model, 1)
    assert len(prepared) == 1


def test_gradients_may_come_and_go_and_lie_anywhere(delta, prepared):
    (model, optimizer), (peer, eager) = training(delta, impl="compiled"), training(delta, impl="eager")
    for step in range(9):
        for each in (model, peer):
            fill_gradients(each, step)
            if step in (3, 4, 5):
                (each.norm.weight if step < 5 else each.norm.bias).grad = None
            if step == 7:
                # One vector holds them all.
                flat = torch.cat([p.grad.flatten() for p in each.parameters()])
                for p, part in zip(each.parameters(), flat.split([p.numel() for p in each.parameters()]), strict=True):
                    p.grad = part.view_as(p)
        optimizer.step()
        eager.step()
        assert_same(optimizer, eager)
    # The first, and where one goes, another instead of it, and none any more.
    assert (prepared.count("compiled"), prepared.count("eager")) == (4, 9)


def test_a_frozen_parameter_is_bound_when_it_is_unfrozen(delta):
    model = trained()
    model.head.weight.requires_grad_(False)
    lacking = fm.ReferenceDelta.from_models(Model(0, head=False), _headless(trained()))
    optimizer = optimizer_of(model, lacking, impl="compiled")
    for step in range(3):
        fill_gradients(model, step)
        model.head.weight.grad = None
        optimizer.step()
    model.head.weight.requires_grad_(True)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"the reference delta lacks 'head\.weight'"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.param_groups[0]["missing"] = "plain"
    assert_goes_on_like_a_fresh_one(model, optimizer)


def _headless(model):
    del model.head
    return model


def assert_unchanged(optimizer, before):
    for mine, theirs in zip(snapshot(optimizer), before, strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_a_group_may_join(delta):
    model = trained()
    pairs = [pair for pair in model.named_parameters() if pair[0] != "head.weight"]
    optimizer = fm.OnDAREAdamW(pairs, reference_delta=delta, lr=1e-2, alpha=0.1, reserve_rate=0.5, impl="compiled")
    run(optimizer, model, 2)
    optimizer.add_param_group({"params": [("head.weight", model.head.weight)], "lr": 0.1})
    assert_goes_on_like_a_fresh_one(model, optimizer)
    assert optimizer.state[model.head.weight]["step"] == 3


def _sparse(p):
    p.grad = p.grad.to_sparse()


def _weights_of_another_form(p):
    # Where they lay.
    p.data = p.data.as_strided(p.shape, (1, len(p)))


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (_weights_of_another_form, RuntimeError, "no compiled code for weights that are not contiguous"),
        (_sparse, ValueError, "the gradient of 'hidden.weight' is sparse"),
    ],
)
def test_what_cannot_be_stepped_is_refused_as_ever_and_changes_nothing(change, error, sentence, delta):
    model, optimizer = training(delta, impl="compiled")
    run(optimizer, model, 3)
    fill_gradients(model, 3)
    change(model.hidden.weight)
    before = snapshot(optimizer)
    with pytest.raises(error, match=sentence):
        optimizer.step()
    assert_unchanged(optimizer, before)
    model.hidden.weight.data = model.hidden.weight.data.contiguous()
    assert_goes_on_like_a_fresh_one(model, optimizer)


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("merge_every", 2, "merge_every of a group is fixed"),
        ("seed", 5, "seed of a group is fixed"),
        ("alpha", 2.0, r"alpha must lie in \[0, 1\]"),
        ("reference", {"identity": "x" * 64, "path": None}, "the state dict was saved with the reference delta xxxx"),
    ],
)
def test_options_are_checked_before_every_step(option, value, sentence, delta):
    model, optimizer = training(delta, impl="compiled")
    run(optimizer, model, 3)
    right, before = optimizer.param_groups[0][option], snapshot(optimizer)
    optimizer.param_groups[0][option] = value
    with pytest.raises(ValueError, match=sentence):
        optimizer.step()
    assert_unchanged(optimizer, before)
    optimizer.param_groups[0][option] = right
    assert_goes_on_like_a_fresh_one(model, optimizer)


def test_overflows_are_not_counted(delta, prepared):
    (model, optimizer), (peer, eager) = (training(delta, impl=impl, merge_every=2) for impl in ("compiled", "eager"))
    for step, found in enumerate([1.0, 0.0, 0.0, 1.0, 0.0]):
        for each in (optimizer, eager):
            each.found_inf, each.grad_scale = torch.tensor(found), torch.tensor(4.0)
        fill_gradients(model, step)
        fill_gradients(peer, step)
        optimizer.step()
        eager.step()
        assert_same(optimizer, eager)
    assert prepared.count("compiled") == 1
    assert optimizer.state[model.head.weight]["step"] == 3


@pytest.mark.parametrize("method", ["ondare", "onties"])
def test_statistics_are_collected_when_it_is_their_turn(method, delta):
    (model, optimizer), (peer, eager) = (
        training(delta, method, impl=impl, stats_every=3) for impl in ("compiled", "eager")
    )
    seen = []
    for step in range(7):
        run(optimizer, model, 1, step)
        run(eager, peer, 1, step)
        assert_same(optimizer, eager)
        assert optimizer.merge_stats() == eager.merge_stats()
        seen.append(str(optimizer.merge_stats()))
    assert len(set(seen)) == 3


def test_statistics_of_a_first_step_that_an_overflow_stops_are_none(delta):
    model, optimizer = training(delta, impl="compiled", stats_every=1)
    optimizer.found_inf = torch.tensor(1.0)
    run(optimizer, model, 1)
    assert optimizer.merge_stats() == {}


def test_steps_that_are_verified_are_prepared(delta, prepared):
    model, optimizer = training(delta, impl="compiled")
    run(optimizer, model, 2)
    fm.verify(optimizer, steps=2)
    run(optimizer, model, 5, first=2)
    # Again as soon as it is over: what was prepared last serves.
    assert len(prepared) == 3
    assert_goes_on_like_a_fresh_one(model, optimizer)


def test_the_environment_may_change_what_runs(delta, prepared, monkeypatch):
    model, optimizer = training(delta, impl="compiled")
    run(optimizer, model, 2)
    monkeypatch.setenv("FUSED_MERGE_IMPL", "eager")
    run(optimizer, model, 2)
    assert len(prepared) == 3


def test_pieces_may_be_told_later(delta):
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in trained().parameters()]))
    model = nn.ParameterDict({"flat": flat})
    whole = fm.ReferenceDelta.from_models({"flat": flat.detach() * 1.01}, {"flat": flat.detach()})
    optimizer = optimizer_of(model, whole, impl="compiled")
    run(optimizer, model, 3)
    pieces = {flat: [Piece("flat", slice(0, len(flat)))]}
    optimizer.set_pieces(pieces)
    peer, fresh = copy.deepcopy((model, optimizer))
    fresh.impl = "eager"
    fresh.set_pieces({peer["flat"]: pieces[flat]})
    run(optimizer, model, 3)
    run(fresh, peer, 3)
    assert_same(optimizer, fresh)


def test_a_delta_of_fewer_rows_counts_in_a_copy(prepared):
    smaller = Model(0)
    smaller.embed = nn.Embedding(7, 8)
    delta = fm.ReferenceDelta.from_models(smaller, nn.Module.half(copy.deepcopy(smaller)))
    model = trained()
    optimizer = optimizer_of(model, delta, impl="compiled", missing="plain")
    run(optimizer, model, 3)
    # The copy knows nothing of a count that is written in place.
    assert len(prepared) == 3
    optimizer.state[model.embed.weight]["step"].fill_(100)
    assert_goes_on_like_a_fresh_one(model, optimizer)


def test_the_last_threshold_of_a_ranked_update_is_known_to_tables_made_again(delta):
    model, optimizer = training(delta, "onties", impl="compiled", reserve_rate=0.2)
    run(optimizer, model, 2)
    plan = optimizer._workspace.part(id(model.embed.weight)).keep(("step", "compiled", DEVICE), lambda: None)
    last, tables = plan._launch.thresholds.last.copy(), plan._launch
    _moves(model, optimizer)
    fill_gradients(model, 2)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert plan._launch is not tables
    # Nothing merged: these are those of the step before.
    assert (plan._launch.thresholds.last == last).all()
    assert (last > 0).all()


def test_neither_gradients_nor_states_are_kept_alive(delta):
    model, optimizer = training(delta, impl="compiled")
    run(optimizer, model, 3)
    held = [weakref.ref(p.grad) for p in model.parameters()]
    held += [weakref.ref(x) for p in model.parameters() for x in optimizer.state[p].values()]
    optimizer.zero_grad()
    optimizer.state.clear()
    gc.collect()
    assert all(each() is None for each in held)


def test_a_copy_begins_anew(delta):
    model, optimizer = training(delta, impl="compiled")
    run(optimizer, model, 3)
    peer, copied = copy.deepcopy((model, optimizer))
    run(optimizer, model, 2)
    run(copied, peer, 2)
    assert_same(optimizer, copied)
