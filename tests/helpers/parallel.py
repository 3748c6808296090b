"""A small model as DDP, FSDP2 and tensor parallelism hold it, and its steps beside those of one process."""

from __future__ import annotations

from functools import cache

import torch
from bits import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fused_merge as fm
from fused_merge.distributed import is_sharded, local_box, local_part
from fused_merge.names import canonical_name

# What every number of processes is tried with; `alone` is a mesh of one process each.
KINDS = {
    2: ["alone", "ddp", "fsdp", "columns", "tp"],
    4: ["ddp", "fsdp", "columns", "hsdp", "tp", "tp and fsdp"],
}
OPTIONS = {"lr": 1e-2, "alpha": 0.1, "weight_decay": 0.1}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        # Neither 2 nor 4 processes share 10 rows or columns evenly with one another's shards of them.
        self.up = nn.Linear(8, 10)
        self.down = nn.Linear(10, 8)
        # Of one element most processes hold nothing.
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.gain * self.down(torch.tanh(self.up(x)))


class Network(nn.Module):
    """Seven words, so that shards of the embedding are uneven; of three rows the fourth process has none."""

    def __init__(self, seed=0, blocks=2, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3, bias=False)
        self.to(dtype)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tuned(seed=1, **options):
    """A model near `Network(0)`, as after fine-tuning."""
    model = Network(0, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def delta(**options):
    return fm.ReferenceDelta.from_models(Network(0, **options), tuned(**options))


def device():
    """The device of this process: its own GPU under NCCL."""
    distributed = torch.distributed
    return torch.device("cuda" if distributed.is_initialized() and distributed.get_backend() == "nccl" else "cpu")


@cache
def mesh_of(*sizes):
    return init_device_mesh(device().type, sizes, mesh_dim_names=("outer", "inner")[: len(sizes)])


def _columns(parameter):
    """Shard a matrix along its columns where FSDP2 can, which wants them even."""
    even = parameter.ndim > 1 and parameter.shape[1] % torch.distributed.get_world_size() == 0
    return Shard(1) if even else Shard(0)


def wrapped(model, kind):
    """Return a model as a kind of parallelism holds it."""
    model = model.to(device())
    if kind == "whole":
        return model
    world = torch.distributed.get_world_size()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind in ("tp", "tp and fsdp"):
        mesh = mesh_of(world) if kind == "tp" else mesh_of(2, world // 2)["inner"]
        for block in model.blocks:
            parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if kind == "tp":
        return model
    meshes = {
        "alone": lambda: mesh_of(world, 1)["inner"],
        "hsdp": lambda: mesh_of(2, world // 2),
        "tp and fsdp": lambda: mesh_of(2, world // 2)["outer"],
    }
    options = {"mesh": meshes[kind]() if kind in meshes else mesh_of(world)}
    if kind == "columns":
        options["shard_placement_fn"] = _columns
    for block in model.blocks:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def named(model):
    return {canonical_name(name): parameter for name, parameter in model.named_parameters()}


def like(parameter, whole):
    """Return a whole tensor as a parameter is held; the part of a DTensor is what `local_box` says."""
    whole = whole.to(parameter.device, parameter.dtype)
    if not is_sharded(parameter):
        return whole.clone()
    part = whole[local_box(parameter)].contiguous()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, shape=whole.shape, stride=whole.stride())


def fill_gradients(model, step, skipped=()):
    """Give every parameter its part of a gradient that all processes agree on."""
    generator = torch.Generator().manual_seed(step)
    for name, parameter in named(model).items():
        whole = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name in skipped or not parameter.requires_grad else like(parameter, whole)


def optimizer_of(model, reference_delta=None, method="ondare", params=None, **options):
    """An optimizer whose merges move every tensor, of these parameter groups or of all parameters."""
    params = model.named_parameters() if params is None else params
    options = OPTIONS | ({} if method == "onproj" else {"reserve_rate": 0.5}) | options
    reference_delta = delta() if reference_delta is None else reference_delta
    return fm.MergingAdamW(params, reference_delta=reference_delta, method=method, **options)


def pairs(kind, dtype=torch.float32, blocks=2, **options):
    """A sharded model and a whole one, and the optimizers of both; the whole one takes the eager steps."""
    models = [tuned(2, dtype=dtype, blocks=blocks) for _ in range(2)]
    sharded, whole = wrapped(models[0], kind), models[1].to(device())
    of_blocks, impl = delta(blocks=blocks), options.pop("impl", "eager")
    ours = optimizer_of(sharded, of_blocks, impl=impl, **options)
    return sharded, ours, whole, optimizer_of(whole, of_blocks, impl="eager", **options)


def steps(model, optimizer, count, first=0, skipped=()):
    for step in range(first, first + count):
        fill_gradients(model, step, skipped)
        optimizer.step()


def held(model, optimizer):
    """Copies of all that a process holds of a model and of its states."""
    return {
        name: {"param": local_part(p.detach()).clone()}
        | {key: local_part(value).clone() for key, value in optimizer.state.get(p, {}).items()}
        for name, p in named(model).items()
    }


def part_of(parameter, whole):
    """The part of a whole tensor that a process holds if it is held as a parameter is; a count is no such tensor."""
    box = local_box(parameter)
    return whole if box is None or whole.ndim == 0 else whole[box]


def assert_held(sharded, optimizer, whole, whole_optimizer):
    """Assert that a process holds its part of parameters and states, bit for bit, and placed as the parameters are."""
    expected = {
        name: {key: part_of(named(sharded)[name], value) for key, value in tensors.items()}
        for name, tensors in held(whole, whole_optimizer).items()
    }
    assert_same_bits(held(sharded, optimizer), expected)
    for parameter in sharded.parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value.ndim and is_sharded(parameter):
                assert value.placements == parameter.placements, key
