"""Options of the optimizers: what is refused, and what may differ between groups."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from device import DEVICE
from models import assert_same, fill_gradients, run, snapshot, trained, training
from torch import nn

import fused_merge as fm


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, "lr must be at least 0, got -1.0"),
        ({"lr": torch.ones(2)}, r"a tensor lr must hold one number, got shape \(2,\)"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] must lie in \[0, 1\), got 1.0"),
        ({"betas": (0.9, -0.1)}, r"betas\[1\] must lie in \[0, 1\), got -0.1"),
        ({"betas": (0.9, 0.95, 0.99)}, r"betas must be two numbers, got \(0.9, 0.95, 0.99\)"),
        ({"betas": (torch.tensor(0.5), 0.9)}, r"betas must be two numbers, got \(tensor\(0.5"),
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        # As YAML has 1e-5.
        ({"lr": "1e-5"}, "lr must be a number or a 0-d tensor, got '1e-5'"),
        ({"lr": None}, "lr must be a number or a 0-d tensor, got None"),
        ({"eps": "1e-8"}, "eps must be at least 0, got '1e-8'"),
        ({"reserve_rate": "0.1"}, r"reserve_rate must lie in \(0, 1\], got '0.1'"),
        ({"seed": "0"}, "seed must be a whole number, got '0'"),
        (
            {"state_dtype": "bf16"},
            "state_dtype must be torch.float32, bfloat16 or float16, or one of these names, got bf1",
        ),
        ({"state_dtype": torch.float64}, "state_dtype must be torch.float32, .* got torch.float64"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
        ({"alpha": 1.5}, r"alpha must lie in \[0, 1\], got 1.5"),
        ({"alpha": float("nan")}, r"alpha must lie in \[0, 1\], got nan"),
        ({"reserve_rate": 0.0}, r"reserve_rate must lie in \(0, 1\], got 0.0"),
        ({"missing": "skip"}, "missing must be 'error' or 'plain', got 'skip'"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"merge_every": 0}, "merge_every must be a whole number of steps, at least 1, got 0"),
        ({"merge_every": -1}, "merge_every must be a whole number of steps, at least 1, got -1"),
        ({"merge_every": 2.0}, "merge_every must be a whole number of steps, at least 1, got 2.0"),
        ({"stats_every": -1}, "stats_every must be at least 0, got -1"),
        *(
            (
                {"rounding": "stochastic", "master": m},
                f"rounding='stochastic' and master='{m}' exclude each other: .*choose",
            )
            for m in ("fp32", "split")
        ),
        ({"method": "dare"}, "unknown method 'dare'"),
        ({"vote": "paper"}, "method 'ondare' has no option 'vote'"),
        ({"method": "onties", "rescale": False}, "method 'onties' has no option 'rescale'"),
    ],
)
def test_options_out_of_range_are_refused(options, sentence, delta):
    with pytest.raises(ValueError, match=sentence):
        training(delta, **options)


def test_an_option_that_a_class_lacks_is_refused(delta):
    with pytest.raises(TypeError, match="gamma"):
        fm.OnDAREAdamW(trained().named_parameters(), reference_delta=delta, gamma=1)


@pytest.mark.parametrize(
    ("option", "why"),
    [
        ("fused", "impl says what steps all tensors, fused kernels where they can run"),
        ("foreach", "impl says what steps all tensors"),
        ("capturable", "every step on a GPU can be captured"),
        ("amsgrad", "this optimizer keeps no largest second moment"),
        ("differentiable", "no step of this optimizer is differentiable"),
    ],
)
def test_a_leftover_of_torch_adamw_is_refused_where_it_asks_for_anything(option, why, delta):
    named = list(trained().named_parameters())
    sentence = f"^{option}=True is an option of torch.optim.AdamW: {why}; leave it out$"
    with pytest.raises(TypeError, match=sentence):
        fm.OnDAREAdamW(named, reference_delta=delta, **{option: True})
    with pytest.raises(TypeError, match=sentence):
        fm.OnDAREAdamW([{"params": named, option: True}], reference_delta=delta)
    optimizer = fm.OnDAREAdamW(named[:1], reference_delta=delta, **{option: False})
    with pytest.raises(TypeError, match=sentence):
        optimizer.add_param_group({"params": named[1:], option: True})
    assert len(optimizer.param_groups) == 1
    # The groups of a torch optimizer, as they are.
    groups = torch.optim.AdamW([{"params": [param for _, param in named]}]).param_groups
    assert fm.OnDAREAdamW(groups, reference_delta=delta).param_groups[0][option] in (False, None)


def test_numbers_and_dtypes_may_be_written_in_several_ways(delta):
    one_model, one = training(delta, lr=1, betas=[0.5, 0.75], state_dtype="bfloat16", alpha=0, weight_decay=0)
    two_model, two = training(
        delta, lr=np.float64(1.0), betas=(0.5, 0.75), state_dtype=torch.bfloat16, alpha=0.0, weight_decay=0.0
    )
    run(one, one_model, 2)
    run(two, two_model, 2)
    assert_same(one, two)
    group = one.param_groups[0]
    assert (group["betas"], group["state_dtype"]) == ((0.5, 0.75), torch.bfloat16)
    assert one.state[one_model.head.weight]["exp_avg"].dtype == torch.bfloat16
    # Said in another way later, it is no change of what is fixed.
    group["state_dtype"] = "bfloat16"
    run(one, one_model, 1, first=2)
    # In a group, too.
    optimizer = fm.OnDAREAdamW(
        [{"params": list(trained().named_parameters()), "state_dtype": "float16"}], reference_delta=delta
    )
    assert optimizer.param_groups[0]["state_dtype"] == torch.float16


def test_what_is_no_reference_delta_is_refused_in_one_sentence(delta):
    model = trained()

    def refused(given, sentence):
        with pytest.raises(TypeError, match=sentence):
            fm.OnDAREAdamW(model.named_parameters(), reference_delta=given)

    refused(None, r"^reference_delta is None: pass fm.ReferenceDelta.from_models\(.*, or use torch.optim.AdamW where")
    one = "the tensors of one model, and a delta is the difference of two: pass fm.ReferenceDelta.from_models"
    refused(model, f"^reference_delta is of type Model, {one}")
    refused(model.state_dict(), f"^reference_delta is of type OrderedDict, {one}")
    refused(dict(model.named_parameters()), f"^reference_delta is of type dict, {one}")
    refused((model, model), "^reference_delta must be a ReferenceDelta or the path of a saved one, got tuple")


def test_the_general_form_is_its_subclasses(delta):
    for cls, method in ((fm.OnDAREAdamW, "ondare"), (fm.OnTIESAdamW, "onties"), (fm.OnProjAdamW, "onproj")):
        one_model, (two_model, two) = trained(), training(delta, method)
        options = {"lr": 1e-2, "alpha": 0.1} | ({} if method == "onproj" else {"reserve_rate": 0.5})
        one = cls(one_model.named_parameters(), reference_delta=delta, **options)
        run(one, one_model, 2)
        run(two, two_model, 2)
        assert_same(one, two)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}], ids=str)
def test_to_maximize_is_to_minimize_the_negated_gradient(options, impl, delta):
    model, ours = training(delta, maximize=True, impl=impl, **options)
    peer, theirs = training(delta, impl=impl, **options)
    for step in range(2):
        fill_gradients(model, step)
        fill_gradients(peer, step)
        for p in peer.parameters():
            p.grad.neg_()
        ours.step()
        theirs.step()
    assert_same(ours, theirs)
    assert all((p.grad == -q.grad).all() for p, q in zip(model.parameters(), peer.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "option", "value"),
    [
        ("ondare", "lr", 3e-2),
        ("ondare", "lr", torch.tensor(3e-2)),
        ("ondare", "betas", (0.5, 0.6)),
        ("ondare", "eps", 1e-2),
        ("ondare", "weight_decay", 0.3),
        ("ondare", "alpha", 0.4),
        ("ondare", "reserve_rate", 0.2),
        ("ondare", "merge_every", 2),
        ("ondare", "project", "conflict"),
        ("ondare", "project", "onto"),
        ("onproj", "project", "onto"),
        ("onproj", "project_over", "rows"),
        ("onproj", "project_on", "update"),
        ("ondare", "maximize", True),
        ("ondare", "missing", "plain"),
        ("ondare", "state_dtype", torch.bfloat16),
        ("ondare", "rounding", "stochastic"),
        ("ondare", "master", "fp32"),
        ("ondare", "master", "split"),
        ("ondare", "seed", 5),
        ("ondare", "method", "onties"),
        ("ondare", "method", "onsoft"),
        ("ondare", "rescale", False),
        ("onties", "vote", "paper"),
    ],
    ids=str,
)
def test_an_option_of_one_group_is_that_of_an_optimizer_of_its_own(method, option, value, delta):
    def halves():
        model = trained()
        if option in ("master", "rounding"):
            model.bfloat16()
        if option == "missing":
            model.extra = nn.Parameter(torch.ones(3, device=DEVICE))
        named = list(model.named_parameters())
        return model, named[::2], named[1::2]

    options = {"reference_delta": delta, "method": method, "lr": 1e-2, "alpha": 0.1, "weight_decay": 0.1}
    if option != "reserve_rate" and method in ("ondare", "onties"):
        options["reserve_rate"] = 0.5 if option != "method" else None
    model, first, second = halves()
    if option == "missing":
        first, second = second, first
    together = fm.MergingAdamW([{"params": first}, {"params": second, option: value}], **options)
    peer, first, second = halves()
    if option == "missing":
        first, second = second, first
    apart = [fm.MergingAdamW(first, **options), fm.MergingAdamW(second, **options | {option: value})]
    plain_model, _, third = halves()
    for step in range(3):
        run(together, model, 1, first=step)
        fill_gradients(peer, step)
        for optimizer in apart:
            optimizer.step()
    assert_same_bits(snapshot(together), [each for optimizer in apart for each in snapshot(optimizer)])
    if option == "missing":
        return
    # And the option shows.
    plain = fm.MergingAdamW(third, **options)
    run(plain, plain_model, 3)
    with pytest.raises(AssertionError):
        assert_same_bits(snapshot(together)[len(together.param_groups[0]["params"]) :], snapshot(plain))


def test_the_strength_of_a_projection_may_differ_by_group(delta):
    runs = []
    for strengths in ([0.25] * 6, [0.75] * 6, [0.25, 0.75] * 3):
        model = trained()
        pairs = zip(model.named_parameters(), strengths, strict=True)
        groups = [{"params": [pair], "project_strength": strength} for pair, strength in pairs]
        run(fm.OnProjAdamW(groups, reference_delta=delta, project="onto", lr=1e-2), model, 2)
        runs.append(list(model.parameters()))
    for i, (quarter, half, mixed) in enumerate(zip(*runs, strict=True)):
        assert torch.equal(mixed, (quarter, half)[i % 2])
        assert not torch.equal(quarter, half)


@pytest.mark.parametrize("option", ["impl", "stats_every"])
def test_options_of_the_optimizer_are_refused_in_a_group(option, delta):
    groups = [{"params": trained().named_parameters(), option: 1}]
    with pytest.raises(ValueError, match=f"{option} is an option of the optimizer, not of a parameter group"):
        fm.OnDAREAdamW(groups, reference_delta=delta)
