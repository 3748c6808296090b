"""The optimizers as `torch.optim.Optimizer`s: steps, options and bad input."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import reference
import torch
from bits import assert_same_bits
from device import DEVICE
from models import assert_same, fill_gradients, optimizer_of, run, trained, training
from one_tensor import assert_near
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_merge as fm
from fused_merge.eager.sparse import SparseTensor


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
        assert_near(p.reshape(-1), expected[name].theta)


def test_order_and_grouping_of_parameters_do_not_show(delta):
    (straight, one), shuffled = training(delta), trained()
    pairs = list(shuffled.named_parameters())[::-1]
    groups = [{"params": pairs[:2]}, {"params": pairs[2:]}]
    two = fm.OnDAREAdamW(groups, reference_delta=delta, lr=1e-2, alpha=0.1, reserve_rate=0.5)
    run(one, straight, 3)
    run(two, shuffled, 3)
    assert_same_bits(straight.state_dict(), shuffled.state_dict())


def test_parameters_without_gradient_rest(delta):
    model, optimizer = training(delta, alpha=0.5, reserve_rate=1.0)
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


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_schedulers_and_changed_options_act_on_the_next_step(tensor, delta):
    lr = torch.tensor(2.0**-6) if tensor else 2.0**-6
    (model, optimizer), (peer, by_hand) = training(delta, lr=lr), training(delta)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        run(optimizer, model, 1, first=step)
        scheduler.step()
        by_hand.param_groups[0]["lr"] = 2.0 ** (-6 - step)
        run(by_hand, peer, 1, first=step)
    assert optimizer.param_groups[0]["lr"] == 2.0**-9
    assert not tensor or optimizer.param_groups[0]["lr"] is lr
    assert_same(optimizer, by_hand)


def test_a_closure_sees_gradients_and_returns_its_loss(delta):
    model, optimizer = training(delta)
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
    model, optimizer = training(delta)
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


def test_sparse_gradients_are_refused_and_nothing_moves(delta):
    model, optimizer = training(delta)
    model.embed.sparse = True
    model(torch.tensor([1, 2], device=DEVICE)).sum().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the gradient of 'embed.weight' is sparse .* nn.Embedding\(sparse=False\)"):
        optimizer.step()
    assert_same_bits(before, model.state_dict())
    assert not optimizer.state


def test_complex_parameters_are_refused(delta):
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    parameter.grad = torch.ones_like(parameter)
    optimizer = fm.OnDAREAdamW([("rotation", parameter)], reference_delta=delta, missing="plain")
    with pytest.raises(ValueError, match=r"'rotation' is torch.complex64; only real floating parameters"):
        optimizer.step()


class HostReads(TorchDispatchMode):
    """Fails where a number is taken out of a tensor, which on a GPU waits for it."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        assert operator is not torch.ops.aten._local_scalar_dense.default, "the host read a tensor"
        return operator(*args, **(kwargs or {}))


def test_reading_a_tensor_on_the_host_is_noticed():
    with HostReads(), pytest.raises(AssertionError, match="the host read a tensor"):
        torch.ones(()).item()


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"merge_every": 2}], ids=str)
@pytest.mark.parametrize("method", ["ondare", "onties", "onproj", "onsoft"])
def test_a_tensor_lr_is_a_float_lr_that_the_host_never_reads(method, options, delta):
    # A power of two is the same number as a tensor in fp32 and as a float.
    model, ours = training(delta, method, lr=torch.tensor(2.0**-6), impl="eager", **options)
    peer, theirs = training(delta, method, lr=2.0**-6, impl="eager", **options)
    ours.bind()
    # Decoding a sparse delta on the CPU reads its offsets.
    for name in delta.names:
        kept = ours._binding.of(name, DEVICE).tau
        ours._binding._bound[name] = ours._binding._bound[name]._replace(
            tau=kept.unpack() if isinstance(kept, SparseTensor) else kept
        )
    for step in range(3):
        fill_gradients(model, step)
        with HostReads():
            ours.step()
        # As a scheduler does: in place.
        ours.param_groups[0]["lr"].mul_(0.5)
        run(theirs, peer, 1, first=step)
        theirs.param_groups[0]["lr"] *= 0.5
    assert_same(ours, theirs)


@pytest.mark.parametrize("impl", ["eager", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_may_have_another_dtype_than_their_parameters(dtype, impl, delta):
    """As torch allows since `grad_dtype`: they are taken as they are and not cast to the weights' dtype."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    (model, ours), (peer, theirs) = training(delta, dtype=dtype, impl=impl), training(delta, impl=impl)
    for step in range(2):
        fill_gradients(peer, step)
        for p, q in zip(model.parameters(), peer.parameters(), strict=True):
            q.grad = q.grad.to(other).float()
            p.grad_dtype = other
            p.grad = q.grad.to(other)
        ours.step()
        theirs.step()
        for p, q in zip(model.parameters(), peer.parameters(), strict=True):
            assert p.grad.dtype == other
            assert torch.equal(ours.state[p]["exp_avg"], theirs.state[q]["exp_avg"])
            assert torch.equal(ours.state[p]["exp_avg_sq"], theirs.state[q]["exp_avg_sq"])


@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16])
def test_moments_of_another_dtype_are_rounded_once_a_step(state_dtype, delta):
    model, optimizer = training(delta, state_dtype=state_dtype)
    expected = {name: (torch.zeros_like(p, dtype=torch.float64),) * 2 for name, p in model.named_parameters()}
    for step in range(3):
        run(optimizer, model, 1, first=step)
        for name, p in model.named_parameters():
            m, v = expected[name]
            g = p.grad.double()
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            bound = torch.finfo(state_dtype).eps
            for key, exact in (("exp_avg", m), ("exp_avg_sq", v)):
                ours = optimizer.state[p][key]
                assert ours.dtype == state_dtype
                assert ((ours.double() - exact).abs() <= bound * exact.abs() + torch.finfo(state_dtype).tiny).all()
            expected[name] = tuple(optimizer.state[p][key].double() for key in ("exp_avg", "exp_avg_sq"))


def test_fp64_parameters_are_stepped_in_fp64(delta):
    model, optimizer = training(delta, dtype=torch.float64, reserve_rate=1.0, state_dtype=torch.bfloat16)
    theta = {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}
    run(optimizer, model, 1)
    for name, p in model.named_parameters():
        g, tau = p.grad.cpu().numpy(), delta.tensor(name).double().numpy()
        m, v = 0.1 * g / (1 - 0.9), 0.001 * g**2 / (1 - 0.999)
        expected = theta[name] + 0.9 * -1e-2 * m / (np.sqrt(v) + 1e-8) + 0.1 * tau
        assert optimizer.state[p]["exp_avg"].dtype == torch.float64
        assert np.abs(p.detach().cpu().numpy() - expected).max() <= 1e-14


SHAPES = {"empty": (0, 4), "flat": (4, 0), "one": (1,), "scalar": (), "single": (1, 1), "row": (1, 5), "column": (5, 1)}


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ondare"},
        {"method": "onties"},
        {"method": "onties", "vote": "paper", "merge_every": 2},
        {"method": "onsoft"},
        {"method": "onproj"},
        {"method": "onproj", "project_over": "rows"},
        {"method": "onproj", "project": "onto", "project_over": "rows", "project_on": "update"},
        {"method": "ondare", "rounding": "stochastic", "max_grad_norm": 1.0},
    ],
    ids=str,
)
def test_tensors_of_hardly_any_elements(options):
    """Each steps as it does alone; those of one element also as one of another shape."""
    base = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    tuned = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    delta = fm.ReferenceDelta.from_models(base, tuned)

    def stepped(names):
        parameters = {name: nn.Parameter(tuned[name].to(DEVICE)) for name in names}
        optimizer = fm.MergingAdamW(
            parameters.items(), reference_delta=delta, lr=0.1, alpha=0.5, stats_every=1, **options
        )
        for _ in range(3):
            for p in parameters.values():
                p.grad = torch.full_like(p, 0.25)
            optimizer.step()
        assert all(stat == stat for row in optimizer.merge_stats().values() for stat in row.values())
        return parameters

    together = stepped(SHAPES)
    for name, p in together.items():
        assert p.shape == SHAPES[name]
        assert p.isfinite().all()
        if "max_grad_norm" not in options:
            assert torch.equal(stepped([name])[name], p)
    if options["method"] != "ondare":
        assert together["one"].item() == together["scalar"].item() == together["single"].item()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ondare"},
        {"method": "onties"},
        {"method": "onproj", "project_over": "rows"},
        {"method": "ondare", "merge_every": 2},
        {"method": "ondare", "rounding": "stochastic"},
        {"method": "ondare", "master": "split"},
        {"method": "ondare", "master": "fp32"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["permuted", "strided", "expanded gradient"])
def test_the_layout_of_a_parameter_does_not_show(layout, options, delta):
    dtype = torch.bfloat16 if "master" in options else torch.float32
    plain, odd = trained().to(dtype), trained().to(dtype)
    weight = odd.hidden.weight.detach()
    if layout == "permuted":
        odd.hidden.weight = nn.Parameter(weight.t().contiguous().t())
    elif layout == "strided":
        room = torch.zeros(16, 16, dtype=dtype, device=DEVICE)
        room[:, ::2] = weight
        odd.hidden.weight = nn.Parameter(room[:, ::2])
    one, two = (optimizer_of(model, delta, **options) for model in (plain, odd))
    for step in range(3):
        for model, optimizer in ((plain, one), (odd, two)):
            fill_gradients(model, step)
            row = model.hidden.weight.grad[:1].clone()
            expanded = row.expand(16, 8)
            model.hidden.weight.grad = expanded if optimizer is two and layout[0] == "e" else expanded.contiguous()
            optimizer.step()
    strides = {"permuted": (1, 16), "strided": (16, 2), "expanded gradient": (8, 1)}
    assert odd.hidden.weight.stride() == strides[layout]
    assert_same(one, two)


def test_what_one_group_cannot_do_no_group_does(delta):
    model = trained()
    named = list(model.named_parameters())
    for _, param in named[3:]:
        param.data = param.data.double()
    groups = [{"params": named[:3]}, {"params": named[3:]}]
    optimizer = fm.MergingAdamW(groups, reference_delta=delta, reserve_rate=0.5, lr=1e-2, impl="triton")
    fill_gradients(model, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=rf"impl='triton' cannot serve {named[3][0]}: torch.float64 weights have no"):
        optimizer.step()
    assert_same_bits(before, model.state_dict())
    assert not optimizer.state
