"""Parts of a tensor, stepped side by side as processes do, are stepped as the whole one is."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from tensors import HYPER

from fused_merge.eager.operands import Operands
from fused_merge.eager.scalars import Hyper
from fused_merge.eager.shard import Shard, ShardIndex
from fused_merge.eager.sparse import SparseTensor
from fused_merge.functional import Anchor, Workspace, merge_rule
from fused_merge.functional.merging_adamw import _taking, prepare

# Of 60 000 elements: as many as nothing, a few, most.
ROWS, LENGTH = 60, 1000
CUTS = [(0, 1), (1, 1), (1, 60)]


def part_of(whole, rows, groups):
    """Return operands for some rows of a whole tensor: copies."""

    def cut(x):
        if isinstance(x, SparseTensor):
            dense = x.unpack()[rows]
            return SparseTensor.pack(dense, dense != 0)
        return x if x is None else x[rows].clone()

    fields = ("param", "grad", "exp_avg", "exp_avg_sq", "tau")
    count = (rows.stop - rows.start) * LENGTH
    shard = Shard(ShardIndex(rows.start * LENGTH, max(count, 1), max(count, 1)), (ROWS, LENGTH), groups)
    anchor = whole.anchor and Anchor(cut(whole.anchor.weights), whole.anchor.decay.clone())
    own = {field: cut(getattr(whole, field)) for field in fields}
    return whole._replace(**own, step=whole.step.clone(), anchor=anchor, shard=shard)


def in_lockstep(generators):
    """Run generators to their ends; what all of them yield is added up, and must be alike."""
    while True:
        rounds = [next(generator, None) for generator in generators]
        if rounds[0] is None:
            assert not any(rounds)
            return
        for sums in zip(*rounds, strict=True):
            total = sum(x.tensor for x in sums)
            for x in sums:
                assert x.tensor.shape == total.shape
                x.tensor.copy_(total)


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("method", ["ondare", "onties", "onsoft"])
def test_parts_of_a_tensor(method, sparse, every):
    generator = torch.Generator().manual_seed(0)
    param, exp_avg, root, tau, anchor = torch.randn(5, ROWS, LENGTH, generator=generator).unbind()
    whole = Operands(
        name="weight",
        param=param,
        grad=param,
        exp_avg=0.1 * exp_avg,
        exp_avg_sq=(0.1 * root).square(),
        step=torch.tensor(4.0),
        tau=SparseTensor.pack(tau, tau.abs() > 2) if sparse else tau,
        tau_dense=None,
        anchor=None if every is None else Anchor(anchor, torch.tensor(0.97)),
        master=None,
        tensor_id=7,
        shard=Shard.whole((ROWS, LENGTH)),
    )
    parts = [part_of(whole, slice(*rows), ("processes",)) for rows in CUTS]
    whole = part_of(whole, slice(0, ROWS), ())
    workspaces = [Workspace() for _ in parts]
    hyper = Hyper(**HYPER, merge_every=every or 1)
    own = {"rule": merge_rule(method, 0.02), "hyper": hyper, "seed": 3, "stats": False}
    for step in range(4):
        whole.grad.copy_(0.1 * torch.randn(ROWS, LENGTH, generator=generator))
        for part, rows in zip(parts, CUTS, strict=True):
            part.grad.copy_(whole.grad[slice(*rows)])
        with torch.no_grad():
            in_lockstep([_taking(prepare([whole], workspace=Workspace(), impl="eager", **own))])
            in_lockstep(
                [
                    _taking(prepare([part], workspace=workspace, impl="compiled", **own))
                    for part, workspace in zip(parts, workspaces, strict=True)
                ]
            )
        for field in ("param", "exp_avg", "exp_avg_sq"):
            found = torch.cat([getattr(part, field) for part in parts])
            assert_same_bits(found, getattr(whole, field), f"{field} at step {step}")
        assert all(part.step == whole.step for part in parts)
