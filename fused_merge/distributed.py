"""The part of a sharded model that this process holds, and the processes that share the model."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fused_merge.eager.shard import Shard, ShardIndex

T = TypeVar("T")


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, as of FSDP2."""
    # Whoever has a DTensor has imported its module; nobody else should wait for the import.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_flattened(tensor: Tensor) -> bool:
    """Return whether FSDP1 has made a tensor part of a `FlatParameter`, or is one; also with `use_orig_params`."""
    return getattr(tensor, "_fsdp_flattened", False)


def local_part(tensor: Tensor) -> Tensor:
    """Return the elements that this process holds: a view of a DTensor, any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    local: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local.wait() if isinstance(local, AsyncCollectiveTensor) else local


def local_box(tensor: Tensor) -> tuple[slice, ...] | None:
    """Return the box of the logical tensor that this process holds, None for all of it.

    Raises ValueError for a DTensor that is neither sharded along dimensions nor replicated.
    """
    if not is_sharded(tensor):
        return None
    from torch.distributed.tensor import placement_types as types

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    coordinate = mesh.get_coordinate()
    box = [slice(0, size) for size in tensor.shape]
    # FSDP2 cuts what tensor parallelism has cut before, although its dimension of the mesh comes first.
    order = sorted(range(mesh.ndim), key=lambda dim: type(placements[dim]) is types._StridedShard)
    for dim in order:
        placement = placements[dim]
        if type(placement) not in (types.Shard, types.Replicate, types._StridedShard):
            raise ValueError(f"a tensor placed as {placements} is no box of the whole; redistribute it as shards first")
        if type(placement) is not types.Replicate:
            box[placement.dim] = _chunk(box[placement.dim], mesh.size(dim), coordinate[dim])
    if tuple(part.stop - part.start for part in box) != tensor.to_local().shape:  # type: ignore[attr-defined]
        raise ValueError(f"a tensor of {tuple(tensor.shape)} placed as {placements} is no box of the whole; gather it")
    return tuple(box)


def _chunk(of: slice, count: int, number: int) -> slice:
    """Return one of `count` chunks of a range, of equal sizes but for the last ones, as `torch.chunk` cuts."""
    size = -(-(of.stop - of.start) // count)
    start, stop = (min(of.start + i * size, of.stop) for i in (number, number + 1))
    return slice(start, stop)


class Fragment(NamedTuple):
    """What a process holds of a logical tensor, and where to read it: some elements of a box of the tensor."""

    shard: Shard
    box: tuple[slice, ...]
    elements: slice | None = None  # of the box, row-major; None for all of them, in the shape of the box

    def of(self, box: Tensor) -> Tensor:
        """Return the elements that are held of the box, a view."""
        return box if self.elements is None else box.reshape(-1)[self.elements]


def fragment_of(tensor: Tensor) -> Fragment | None:
    """Return what this process holds of a DTensor; None for a whole tensor.

    Raises ValueError if that is no box of the logical tensor, or one whose elements `ShardIndex` cannot number.
    """
    box = local_box(tensor)
    if box is None:
        return None
    shape = tuple(tensor.shape)
    cut = [dim for dim in range(1, len(shape)) if (box[dim].start, box[dim].stop) != (0, shape[dim])]
    sharded = {placement.dim for placement in tensor.placements if not placement.is_replicate()}  # type: ignore[attr-defined]
    if len(sharded - {0}) > 1:
        raise ValueError(
            f"a tensor of {shape} is sharded along dimensions {sorted(sharded)}; its elements are numbered for one "
            "dimension besides the first: shard it along fewer"
        )
    # Elements from the sharded dimension on are neighbors; dim 0 is no matter, where the first element lies is enough.
    inner = min(cut, default=0)
    sizes = [part.stop - part.start for part in box]
    offset = sum(part.start * math.prod(shape[dim + 1 :]) for dim, part in enumerate(box))
    run, distance = math.prod(sizes[inner:]), math.prod(shape[inner:])
    index = ShardIndex(offset, max(run, 1), max(distance if cut else run, 1))
    across = sharding_groups(tensor, first=1)
    return Fragment(Shard(index, shape, sharding_groups(tensor), across), box)


def sharding_groups(tensor: Tensor, *, first: int = 0) -> tuple[Any, ...]:
    """Return the process groups over which sums of local elements add up to sums of the logical tensor.

    With `first=1` only those that shard other dimensions than dim 0: what is added up over rows.
    """
    if not is_sharded(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return tuple(
        mesh.get_group(dim)
        for dim, placement in enumerate(placements)
        if not placement.is_replicate() and placement.dim >= first and mesh.size(dim) > 1
    )


def reshard(model: nn.Module) -> None:
    """Make FSDP2 drop the whole weights that it may keep after a forward pass, so that the next one gathers anew."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for part in model.modules() if fsdp else ():
        if isinstance(part, fsdp.FSDPModule):  # type: ignore[union-attr]
            part.reshard()


def sum_over(values: Tensor, groups: tuple[Any, ...]) -> Tensor:
    """Return values added up over process groups, the same on every process; mutates `values`."""
    for group in groups:
        types = [device.type for device in group._device_types]
        if values.device.type in types:
            torch.distributed.all_reduce(values, group=group)
        else:
            # NCCL adds up on GPUs alone, and offloaded weights lie on the CPU.
            total = values.to(types[0])
            torch.distributed.all_reduce(total, group=group)
            values.copy_(total)
    return values


class Processes(NamedTuple):
    """The processes that share a model: those of DDP, and of the meshes that its weights are sharded over."""

    groups: tuple[Any, ...]  # in the same order on all processes; none for a single one
    device: torch.device  # where the model is, and what they exchange

    @classmethod
    def of(cls, model: nn.Module) -> Processes:
        """Return the processes that share a model; weights that FSDP2 has gathered are sharded again, to show them."""
        reshard(model)
        ddp = nn.parallel.DistributedDataParallel
        groups = [part.process_group for part in model.modules() if isinstance(part, ddp)]
        return cls.that_share(list(model.parameters()), groups)

    @classmethod
    def that_share(cls, tensors: Sequence[Tensor], groups: Iterable[Any] = ()) -> Processes:
        """Return the processes of these groups and of the meshes that tensors are placed on."""
        meshes = dict.fromkeys(t.device_mesh for t in tensors if is_sharded(t))  # type: ignore[attr-defined]
        found = [*groups, *(mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim))]
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        return cls(tuple(dict.fromkeys(found)), device)

    @property
    def size(self) -> int:
        """How many there are."""
        return math.prod(torch.distributed.get_world_size(group) for group in self.groups)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files for all."""
        return all(torch.distributed.get_rank(group) == 0 for group in self.groups)

    def from_first(self, value: T) -> T:
        """Return, on every process, what the first one passed: plain data."""
        box = [value]
        for group in self.groups:
            torch.distributed.broadcast_object_list(box, group=group, group_src=0, device=self.device)
        return box[0]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of what every process passed, the same on all; mutates `values`."""
        return sum_over(values, self.groups) / self.size

    def gathered(self, value: T) -> list[T]:
        """Return what all processes passed, plain data, in the same order on all of them."""
        values = [value]
        for group in self.groups:
            parts: list[Any] = [None] * torch.distributed.get_world_size(group)
            torch.distributed.all_gather_object(parts, values, group=group)
            values = [each for part in parts for each in part]
        return values

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """Raise on every process if the block raises on one: the same sentence, as ValueError or RuntimeError.

        So none waits for one that has failed. All must come here, and the block must contain no collective operation.
        """
        if not self.groups:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        if sum_over(torch.full((), float(failure is not None), device=self.device), self.groups) == 0:
            return
        told = None if failure is None else (isinstance(failure, ValueError), str(failure))
        sentences = self.gathered(told)
        if failure is not None:
            raise failure
        is_value_error, sentence = next(each for each in sentences if each is not None)
        raise (ValueError if is_value_error else RuntimeError)(sentence)


# A process that shares nothing with others.
ALONE = Processes((), torch.device("cpu"))
