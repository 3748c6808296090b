"""Parameters that are held in ways that cannot be stepped, for `tests/distributed/test_refused.py`."""

from __future__ import annotations

import parallel
import pytest
import torch
from bits import same_bits
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import fused_merge as fm
from fused_merge.distributed import local_part

WAYS = {"two dimensions": (Shard(1), Shard(2)), "partial": (Partial(), Replicate())}


def step(rank, way):
    """Try to step a parameter that is held in such a way, beside one that is whole; return the sentence."""
    shape, mesh = (4, 4, 4), parallel.mesh_of(2, 2)
    local = torch.ones(4, 2, 2) if way == "two dimensions" else torch.ones(shape)
    odd = nn.Parameter(DTensor.from_local(local.to(parallel.device()), mesh, WAYS[way]))
    plain = nn.Parameter(torch.ones(3, device=parallel.device()))
    ends = [{"plain": torch.zeros(3) + n, "odd": torch.zeros(shape) + n} for n in (0, 1)]
    optimizer = fm.OnDAREAdamW([("plain", plain), ("odd", odd)], reference_delta=fm.ReferenceDelta.from_models(*ends))
    for parameter in (plain, odd):
        parameter.grad = torch.ones_like(parameter)
    before = [local_part(parameter.detach()).clone() for parameter in (plain, odd)]
    with pytest.raises(ValueError, match="odd") as raised:
        optimizer.step()
    assert all(map(same_bits, before, [local_part(parameter.detach()) for parameter in (plain, odd)]))
    assert not optimizer.state
    return str(raised.value)
