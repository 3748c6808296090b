"""Optimizers with an `OnlineMerging` around them, in one process and on two that share a model."""

from __future__ import annotations

import reference
import torch
from bits import same_bits
from models import Model, run, trained
from one_tensor import assert_near
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import fused_merge as fm
from fused_merge.distributed import Fragment
from fused_merge.eager.shard import Shard, ShardIndex
from fused_merge.optim.pieces import Piece

ALPHA = 0.1
METHODS = [{"method": "ondare", "reserve_rate": 0.5}, {"method": "onties", "reserve_rate": 0.5}, {"method": "onproj"}]


def merging_of(optimizer, delta, method="ondare", **options):
    own = {} if method == "onproj" else {"reserve_rate": 0.5}
    return fm.OnlineMerging(optimizer, reference_delta=delta, method=method, **{"alpha": ALPHA} | own | options)


def sgd_run(delta, lr=1e-2, **options):
    """A model, its optimizer, and what merges around that."""
    model = trained()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=lr, momentum=0.9)
    return model, optimizer, merging_of(optimizer, delta, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_merged_by_the_equation(make, delta, every, options):
    """Train with `make(named parameters)`, and see that each merge is that of what the optimizer alone adds."""
    model, plain = trained(), trained()
    optimizer, alone = (make(list(each.named_parameters())) for each in (model, plain))
    merging = merging_of(optimizer, delta, merge_every=every, **options)
    stepped = {name for name, p in model.named_parameters() if any(p is q for q in optimizer.param_groups[0]["params"])}
    anchors = weights(model)
    project = {"project": "conflict" if options["method"] == "onproj" else None, "project_on": "update"}
    for number in range(1, 4):
        plain.load_state_dict(model.state_dict())
        run(alone, plain, 1, number)
        run(optimizer, model, 1, number)
        for name in stepped:
            theta, ours = (weights(each)[name] for each in (plain, model))
            if number % every:
                assert same_bits(ours, theta)
                continue
            start, tau = anchors[name].cpu().double().numpy(), delta.tensor(name).double().numpy()
            by_hand = reference.Run(start, start, start, number, tau, name, alpha=ALPHA, **project, **options)
            u = by_hand.projected(theta.cpu().double().numpy() - start, "update")
            assert_near(ours, start + by_hand.merged(u), 1e-5)
            assert not same_bits(ours, theta)
        if number % every == 0:
            anchors = weights(model)
    assert {own["step"] for own in merging.state_dict()["state"].values()} == {3}


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in trained().named_parameters()}


def delta_of_two():
    return fm.ReferenceDelta.from_models(Model(0), trained())


def alone(options, steps):
    """The weights of one process."""
    model = trained()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2, momentum=0.9)
    merging = merging_of(optimizer, delta_of_two(), **options)
    for step in range(steps):
        for (_, p), grad in zip(model.named_parameters(), gradients(step).values(), strict=True):
            p.grad = grad
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, merging.state_dict()["state"]


def under_fsdp(rank, options, steps):
    """The whole weights and anchors of a model that FSDP2 shards."""
    model = trained()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2, momentum=0.9)
    merging = merging_of(optimizer, delta_of_two(), **options)
    for step in range(steps):
        for (_, p), grad in zip(model.named_parameters(), gradients(step).values(), strict=True):
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        optimizer.step()
    state = merging.state_dict()["state"]
    state = {
        name: {k: getattr(x, "full_tensor", lambda x=x: x)() for k, x in own.items()} for name, own in state.items()
    }
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}, state


def in_a_flat_tensor(rank, options, steps):
    """A process's half of all parameters, one after the other in one vector, as ZeRO has them, and its anchor."""
    named = {name: p.detach() for name, p in trained().named_parameters()}
    whole = torch.cat([p.reshape(-1) for p in named.values()])
    size = -(-len(whole) // 2)
    first = rank * size
    flat = torch.nn.Parameter(whole[first : first + size].clone())
    pieces, offset, group = [], 0, torch.distributed.group.WORLD
    for name, p in named.items():
        start, stop = (min(max(edge - offset, 0), p.numel()) for edge in (first, first + size))
        local = min(max(offset - first, 0), size)
        index = ShardIndex(start, max(stop - start, 1), max(stop - start, 1))
        shard = Shard(index, tuple(p.shape), (group,), (group,), cuts_rows=True)
        box = tuple(slice(0, n) for n in p.shape)
        pieces.append(Piece(name, slice(local, local + stop - start), Fragment(shard, box, slice(start, stop))))
        offset += p.numel()
    optimizer = torch.optim.SGD([flat], lr=1e-2, momentum=0.9)
    merging = merging_of(optimizer, delta_of_two(), **options)
    merging.set_pieces({flat: pieces})
    for step in range(steps):
        flat.grad = torch.cat([grad.reshape(-1) for grad in gradients(step).values()])[first : first + size]
        optimizer.step()
    return flat.detach(), merging.state_dict()["state"]


def badly(rank):
    """One process has another delta: the step must raise on both and change nothing."""
    model = trained()
    fully_shard(model)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2)
    base = Model(0)
    if rank:
        base.norm.bias.data += 1.0
    fm.OnlineMerging(optimizer, reference_delta=fm.ReferenceDelta.from_models(base, trained()))
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.full_tensor() for p in model.parameters()]
    try:
        optimizer.step()
    except ValueError as error:
        assert all(torch.equal(p.full_tensor(), q) for p, q in zip(model.parameters(), before, strict=True))
        return str(error)
