"""What two processes do with torch's ZeroRedundancyOptimizer, for `test_zero_redundancy`."""

from __future__ import annotations

import io
from functools import partial

import torch
from models import Model, fill_gradients, optimizer_of, trained
from torch.distributed.optim import ZeroRedundancyOptimizer

import fused_merge as fm

OPTIONS = {"lr": 1e-2, "alpha": 0.1, "reserve_rate": 0.5, "weight_decay": 0.1}


def delta_of():
    return fm.ReferenceDelta.from_models(Model(0), trained())


def sharded(model, delta, grouped, form):
    """The optimizer as its users write it: all options at once, or those of the merge bound before."""
    parameters = list(model.parameters())
    if grouped == "groups":
        rest = [p for p in parameters if p.ndim < 2]
        parameters = [{"params": [p for p in parameters if p.ndim > 1]}, {"params": rest, "lr": 2e-2}]
    elif grouped == "a rank without parameters":
        # Each group has one parameter: one of the processes has none of it.
        parameters = [{"params": [p], "lr": 2e-2 if p.ndim < 2 else 1e-2} for p in parameters]
    merging = {"reference_delta": delta, "names_of": model}
    if form == "partial":
        return ZeroRedundancyOptimizer(parameters, partial(fm.OnDAREAdamW, **merging), **OPTIONS)
    return ZeroRedundancyOptimizer(parameters, fm.OnDAREAdamW, **merging, **OPTIONS)


def groups_of(model, grouped):
    named = list(model.named_parameters())
    if grouped == "one":
        return [{"params": named}]
    return [
        {"params": [pair for pair in named if pair[1].ndim > 1]},
        {"params": [pair for pair in named if pair[1].ndim < 2], "lr": 2e-2},
    ]


def steps(optimizer, model, first, last):
    for step in range(first, last):
        fill_gradients(model, step)
        optimizer.step()


def consolidated(rank, optimizer):
    """The bytes of the state dict as the first process saves it."""
    optimizer.consolidate_state_dict(to=0)
    saved = [b""]
    if rank == 0:
        buffer = io.BytesIO()
        torch.save(optimizer.state_dict(), buffer)
        saved = [buffer.getvalue()]
    torch.distributed.broadcast_object_list(saved, src=0)
    return saved[0]


def loaded(saved):
    """The same as read without pickle: of what is handed over with the options, model and delta are not saved."""
    return torch.load(io.BytesIO(saved), weights_only=True)


def train_and_resume(rank, grouped, form):
    """Four steps here, two and two with a consolidated state dict between them, and four without sharding."""
    delta, model, resumed, whole = delta_of(), trained(), trained(), trained()
    optimizer = sharded(model, delta, grouped, form)
    steps(optimizer, model, 0, 2)
    saved = consolidated(rank, optimizer)
    resumed.load_state_dict(model.state_dict())
    other = sharded(resumed, delta, grouped, form)
    other.load_state_dict(loaded(saved))
    steps(optimizer, model, 2, 4)
    steps(other, resumed, 2, 4)
    steps(fm.OnDAREAdamW(groups_of(whole, grouped), reference_delta=delta, **OPTIONS), whole, 0, 4)
    names = [name for group in other.optim.param_groups for name in group["param_names"]]
    return [[p.detach() for p in each.parameters()] for each in (model, resumed, whole)], names, len(saved)


def unnamed(rank):
    model = trained()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), fm.OnDAREAdamW, reference_delta=delta_of(), lr=1e-2)
    fill_gradients(model, 0)
    optimizer.step()


def resume_with_another_delta(rank):
    model = trained()
    optimizer = sharded(model, delta_of(), "one", "keywords")
    steps(optimizer, model, 0, 1)
    state_dict = loaded(consolidated(rank, optimizer))
    other = sharded(model, fm.ReferenceDelta.from_models(Model(0), trained(2)), "one", "keywords")
    other.load_state_dict(state_dict)
    steps(other, model, 1, 2)


def load_into_one_process(rank):
    """A consolidated state dict goes on without sharding, whatever names it brings."""
    delta, model, alone = delta_of(), trained(), trained()
    optimizer = sharded(model, delta, "one", "keywords")
    steps(optimizer, model, 0, 2)
    alone.load_state_dict(model.state_dict())
    single = optimizer_of(alone, delta, weight_decay=0.1)
    single.load_state_dict(loaded(consolidated(rank, optimizer)))
    steps(optimizer, model, 2, 4)
    steps(single, alone, 2, 4)
    return [[p.detach() for p in each.parameters()] for each in (model, alone)]


def grown(rank):
    """Two steps of a part of the model, and two of all of it."""
    delta, model, whole = delta_of(), trained(), trained()
    named, plain = list(model.named_parameters()), list(whole.named_parameters())
    optimizer = ZeroRedundancyOptimizer(
        [p for _, p in named[:3]], fm.OnDAREAdamW, reference_delta=delta, names_of=model, **OPTIONS
    )
    peer = fm.OnDAREAdamW(plain[:3], reference_delta=delta, **OPTIONS)
    for each, of in ((optimizer, model), (peer, whole)):
        steps(each, of, 0, 2)
    optimizer.add_param_group({"params": named[3:], "lr": 2e-2})
    peer.add_param_group({"params": plain[3:], "lr": 2e-2})
    for each, of in ((optimizer, model), (peer, whole)):
        steps(each, of, 2, 4)
    return [[p.detach() for p in each.parameters()] for each in (model, whole)]


def few_parameters(rank):
    """One parameter for two processes."""
    delta, model, whole = delta_of(), trained(), trained()
    optimizer = ZeroRedundancyOptimizer(
        [model.head.weight], fm.OnDAREAdamW, reference_delta=delta, names_of=model, **OPTIONS
    )
    steps(optimizer, model, 0, 3)
    steps(fm.OnDAREAdamW([("head.weight", whole.head.weight)], reference_delta=delta, **OPTIONS), whole, 0, 3)
    return [[p.detach() for p in each.parameters()] for each in (model, whole)]
