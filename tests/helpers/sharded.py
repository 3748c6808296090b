"""What two processes do with a model under FSDP2 or DDP, for `test_sharded`."""

from __future__ import annotations

import math
from contextlib import suppress

import pytest
import torch
from bits import same_bits
from families import family_model
from processes import WORLD
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_merge import LayerRatios, RatioSweep, adapt_ratios, evaluate_ratios, interpolate
from fused_merge.distributed import local_box, local_part, reshard
from fused_merge.names import canonical_name


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 5)
        # Of one element the second process holds nothing.
        self.gain = nn.Parameter(torch.rand(1) + 0.5)

    def forward(self, x):
        return x + self.gain * torch.tanh(self.linear(x))


class Network(nn.Module):
    """No first dimension is even; the head is tied, and buffers are whole on every process."""

    def __init__(self, seed, dtype=torch.float64, frozen=False):
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(5)
        for parameter in self.norm.parameters():
            nn.init.normal_(parameter, 1.0, 0.1)
        self.register_buffer("scale", torch.rand(3))
        self.register_buffer("count", torch.tensor(seed))
        self.to(dtype)
        self.layers[0].linear.weight.requires_grad_(not frozen)

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.embed.weight.T * self.scale.sum()


PARTS = LayerRatios.by_patterns(Network(0), {r"embed.*|layers\.0.*": 0.3, ".*": 0.7})

OPTIONS = {"parts": PARTS, "mean_ratio": 0.5, "steps": 6, "progress": False}


def batch_of(rank):
    return torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(rank))


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def wrapped(kind, seed=2, **options):
    """A model under FSDP2 or DDP, or one of several that know nothing of one another."""
    model = Network(seed, **options)
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "replica":
        return model
    options = {"mesh": init_device_mesh("cpu", (WORLD,)), "reshard_after_forward": kind == "fsdp"}
    for layer in model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def held(model):
    """Copies of what this process holds of a model, with the boxes of the whole tensors that these are."""
    reshard(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {canonical_name(name): (local_box(t), local_part(t.detach()).clone()) for name, t in tensors.items()}


def assert_held(model, whole):
    """Assert that a process holds its part of every tensor of a state dict, bit for bit."""
    parts = held(model)
    assert parts.keys() == whole.keys()
    for name, (box, part) in parts.items():
        assert same_bits(part, whole[name] if box is None else whole[name][box]), name


def ends(dtype=torch.float64):
    return Network(0, dtype), Network(1, dtype)


def points_of(ratios, dtype=torch.float64):
    return interpolate(*(end.state_dict() for end in ends(dtype)), ratios)


def adapted(model, batches, loss_fn=loss_of, **options):
    return adapt_ratios(model, *ends(), loss_fn, batches, **OPTIONS | options)


RATIOS = [0.0, 0.3, PARTS, 1.0, 1.2]


def sweep(rank, kind, dtype, folder):
    """Go along the path, from the files of a folder if there is one, and come back."""
    base, tuned = ends(dtype) if folder is None else (folder / "base.safetensors", folder / "tuned.safetensors")
    model, before = wrapped(kind, dtype=dtype), Network(2, dtype).state_dict()
    sweep = RatioSweep(model, base, tuned)
    points = points_of(RATIOS, dtype)
    for ratio, point in zip(RATIOS, points, strict=True):
        with sweep.at(ratio):
            assert_held(model, point)
        assert_held(model, before)
    with sweep.at(0.5):
        for ratio, point in zip(RATIOS, points, strict=True):
            sweep.move_to(ratio)
            assert_held(model, point)
    assert_held(model, before)
    return [0 in part.shape for _, part in held(model).values()]


def sweep_of_a_family(rank, family, folders):
    """Go along the path between files whose names or packing are not those of the model, sharded as in training."""
    model, (base, tuned) = family_model(family, 2), (family_model(family, seed) for seed in (0, 1))
    for layer in next(part for part in model.modules() if isinstance(part, nn.ModuleList)):
        fully_shard(layer, mesh=(mesh := init_device_mesh("cpu", (WORLD,))))
    sweep = RatioSweep(fully_shard(model, mesh=mesh), *folders)
    for ratio in (0.0, 0.3, 1.0):
        point = interpolate(base.state_dict(), tuned.state_dict(), [ratio])[0]
        with sweep.at(ratio):
            # Some buffers are made anew and not saved.
            parts = {name: own for name, own in held(model).items() if name in point}
        assert parts.keys() == point.keys()
        assert all(
            same_bits(part, point[name] if box is None else point[name][box]) for name, (box, part) in parts.items()
        )


def forward_after_moving(rank, kind):
    """A forward pass uses the weights that were just written, and so does one after an exception within `at`."""
    model, batch, whole = wrapped(kind), batch_of(0), Network(3)
    sweep = RatioSweep(model, *ends())
    expected = []
    for point in [*points_of(RATIOS), Network(2).state_dict()]:
        whole.load_state_dict(point)
        expected.append(whole(batch).detach())
    found = []
    with torch.no_grad():
        # So that there are gathered weights to be used by mistake.
        model(batch)
        with sweep.at(0.1):
            for ratio in RATIOS:
                sweep.move_to(ratio)
                found.append(model(batch))
        found.append(model(batch))
    assert all(map(torch.equal, found, expected))
    with suppress(KeyboardInterrupt), sweep.at(0.5):
        # FSDP2 is left with gathered weights.
        model(batch)
        raise KeyboardInterrupt
    assert_held(model, Network(2).state_dict())
    assert torch.equal(model(batch), expected[-1])


def adapt(rank, kind, options):
    """Adapt with a batch of its own on each process, and alone with both; return the ratios of either."""
    model = wrapped(kind, frozen=True)
    # A parameter that was frozen when FSDP2 gathered it has to get its gradient nevertheless.
    loss_of(model, batch_of(0)).backward()
    before = {name: (p.grad, p.requires_grad) for name, p in model.named_parameters()}
    frozen = [name for name, (grad, required) in before.items() if grad is None and not required]
    assert len(frozen) == 1 == len([grad for grad, required in before.values() if grad is None or not required])
    found = adapted(model, [batch_of(rank)], **options)
    assert_held(model, Network(2).state_dict())
    assert all(p.grad is before[name][0] and p.requires_grad == before[name][1] for name, p in model.named_parameters())
    alone = adapted(Network(2), [batch_of(0), batch_of(1)], **options | {"accumulate": 2})
    return found, found.history, alone, alone.history


def adapt_alone(rank):
    """Adapt one of two replicas that no wrapper ties together."""
    return adapted(wrapped("replica"), [batch_of(rank)]).ratios if rank else None


def adapt_counting_reductions(rank):
    model, buckets = wrapped("ddp"), []

    def hook(state, bucket):
        buckets.append(bucket.index())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    adapted(model, [batch_of(rank)])
    assert not buckets
    loss_of(model, batch_of(rank)).backward()
    return len(buckets)


def adapt_badly(rank, kind, fault, folder):
    """One process gets something bad, or cannot read at the n-th time: entering, moving, in a gradient."""
    model, (base, tuned), ends_of = wrapped(kind), ends(), RatioSweep.ends_of
    journal, batches, calls, reads = None, [batch_of(rank)], [], []

    def read(*arguments):
        reads.append(1)
        if rank == 1 and len(reads) == fault:
            raise OSError("the disk went away")
        return ends_of(*arguments)

    def loss_fn(model, batch):
        calls.append(1)
        if fault == "later journal" and len(calls) == 3 and rank == 0:
            # A file takes the folder's place when two steps are in it.
            journal.unlink()
            journal.parent.rmdir()
            journal.parent.touch()
        return loss_of(model, batch) * (math.nan if fault == "nan" and rank == 1 and len(calls) == 3 else 1)

    if fault == "batches" and rank == 0:
        batches = iter([batch_of(rank)] * 2)
    elif fault in ("journal", "later journal"):
        journal = folder / ("file" if fault == "journal" else "there") / "journal.json"
    elif fault == "base" and rank == 1:
        tuned = Network(1, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RatioSweep, "ends_of", read)
        try:
            adapt_ratios(model, base, tuned, loss_fn, batches, **OPTIONS, journal=journal)
        finally:
            assert_held(model, Network(2).state_dict())
            assert all(p.grad is None for p in model.parameters())


def adapt_twice(rank, kind, folder):
    """A run that is killed in its fourth step, and goes on; only the first process knows of the journal's folder."""
    journal, seen = folder / f"rank{rank}" / "journal.json", []

    def loss_fn(model, batch):
        seen.append(int(batch[0, 0]))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return loss_of(model, batch)

    model, batches = wrapped(kind), [batch_of(rank).roll(i, 1) for i in range(3)]
    with pytest.raises(KeyboardInterrupt):
        adapted(model, batches, loss_fn, journal=journal)
    assert_held(model, Network(2).state_dict())
    found = adapted(model, batches, loss_fn, journal=journal)
    order = [int(batch[0, 0]) for batch in batches] * 2
    assert seen == order[:4] + order[3:]
    whole = adapted(wrapped(kind), batches)
    return found, found.history, whole, whole.history


def evaluate(rank, kind, folder, fault):
    """Score on batches of each process's own: what counts is the first one's."""
    model = wrapped(kind)

    def loss(model):
        return loss_of(model, batch_of(rank)).detach()

    def own(model):
        calls.append(1)
        if fault == "nan" and rank == 1 and len(calls) == 2:
            return math.nan
        if fault == "stop" and len(calls) == 2:
            raise KeyboardInterrupt
        return {"rank": rank}

    own.lower_is_better = {"rank"} if rank == 0 else set()
    calls = []
    ratios, scorers = {"0.25": 0.25, "parts": dict(PARTS), "1": 1}, {"loss": loss, "own": own}
    out = folder / ("nowhere" if rank else "out")
    try:
        rows = evaluate_ratios(RatioSweep(model, *ends()), ratios, scorers, out, progress=False)
    finally:
        assert_held(model, Network(2).state_dict())
    return rows, len(calls)
