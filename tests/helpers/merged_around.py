"""An optimizer with an `OnlineMerging` around it, on two processes that share a model: what they are left with."""

from __future__ import annotations

import torch
from models import Model, trained
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

import fused_merge as fm
from fused_merge.distributed import Fragment
from fused_merge.eager.shard import Shard, ShardIndex
from fused_merge.optim.pieces import Piece


def gradients(step):
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=generator) for name, p in trained().named_parameters()}


def delta_of_two():
    return fm.ReferenceDelta.from_models(Model(0), trained())


def merge_around(optimizer, options):
    own = {} if options.get("method") == "onproj" else {"reserve_rate": 0.5}
    return fm.OnlineMerging(optimizer, reference_delta=delta_of_two(), **{"alpha": 0.1} | own | options)


def alone(options, steps):
    """The weights of one process."""
    model = trained()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=1e-2, momentum=0.9)
    merging = merge_around(optimizer, options)
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
    merging = merge_around(optimizer, options)
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
    merging = merge_around(optimizer, options)
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
