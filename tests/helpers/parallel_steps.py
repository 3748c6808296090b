"""What each of several processes does in `tests/distributed/test_steps.py`."""

from __future__ import annotations

import math

import parallel
import torch
from bits import assert_same_bits
from parallel import assert_held, fill_gradients, held, named, optimizer_of, pairs, part_of, steps, tuned, wrapped
from torch.distributed.tensor.debug import CommDebugMode

from fused_merge.distributed import local_part
from fused_merge.optim.state import state_dtypes


def sizes(rank, kind):
    """Return how many elements of each parameter a process holds."""
    return {name: local_part(parameter).numel() for name, parameter in named(wrapped(tuned(), kind)).items()}


def same_bits_as_one_process(rank, kind, count, dtype, options):
    """Take steps beside the whole model, and compare after each of them."""
    sharded, ours, whole, theirs = pairs(kind, dtype, **options)
    for step in range(count):
        steps(sharded, ours, 1, step)
        steps(whole, theirs, 1, step)
        assert_held(sharded, ours, whole, theirs)
    for parameter in sharded.parameters():
        dtypes = state_dtypes(parameter, ours.param_groups[0])
        assert all(value.dtype == dtypes[key] for key, value in ours.state[parameter].items())


def ulps(a, b):
    """How many numbers of their format lie between two tensors, at most."""
    if not a.numel():
        return 0
    signed = [torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in (t.detach().cpu().view(torch.int32).long() for t in (a, b))]
    return int((signed[0] - signed[1]).abs().max())


def nearly_as_one_process(rank, kind, options):
    """Take a step beside the whole model; return the largest distance of weights and the norms of both."""
    sharded, ours, whole, theirs = pairs(kind, **options)
    steps(sharded, ours, 1)
    steps(whole, theirs, 1)
    far = max(ulps(local_part(p), part_of(p, named(whole)[name])) for name, p in named(sharded).items())
    return far, [optimizer.grad_norm and float(optimizer.grad_norm) for optimizer in (ours, theirs)]


def statistics(rank, kind, options):
    sharded, ours, whole, theirs = pairs(kind, stats_every=1, **options)
    steps(sharded, ours, 1)
    steps(whole, theirs, 1)
    return ours.merge_stats(), theirs.merge_stats()


def collectives(rank, kind, blocks, options):
    """Return how many collective operations the first and the second step of a model of some blocks take."""
    model = wrapped(tuned(2, blocks=blocks), kind)
    optimizer = optimizer_of(model, parallel.delta(blocks=blocks), **options)
    counts = []
    for step in range(2):
        fill_gradients(model, step)
        with CommDebugMode() as counted:
            optimizer.step()
        counts.append(counted.get_total_counts())
    return counts
