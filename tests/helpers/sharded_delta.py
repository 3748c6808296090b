"""What two processes do with the delta of a model that they share."""

from __future__ import annotations

import torch
from bits import same_bits
from processes import WORLD
from tiny import llama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from fused_merge.delta.reference_delta import ReferenceDelta
from fused_merge.distributed import fragment_of


def fsdp(seed, dtype=torch.float32):
    """A model under FSDP2, uneven shards among its tensors."""
    model, mesh = llama(seed, dtype=dtype), init_device_mesh("cpu", (WORLD,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def assert_packed_alike(one, other):
    assert one.shape == other.shape
    assert all(same_bits(getattr(one, part), getattr(other, part)) for part in ("mask", "values", "offsets"))


def sparsify(rank, folders, sparsities):
    """F(tau) of rows under FSDP2, and of columns, is the part of F(tau) of the whole."""
    delta, mesh = ReferenceDelta.from_checkpoints(*folders), init_device_mesh("cpu", (WORLD,))
    parameters = dict(fsdp(0).named_parameters())
    assert [*parameters] == [*delta.names]
    for name, parameter in parameters.items():
        columns = distribute_tensor(torch.zeros(parameter.shape), mesh, [Shard(parameter.ndim - 1)])
        for own in (fragment_of(parameter), fragment_of(columns)):
            for sparsity in sparsities:
                part = delta.sparse(name, sparsity, own)
                assert_packed_alike(part, delta.sparse(name, sparsity).part(own.box))
