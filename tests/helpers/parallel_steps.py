"""What each of several processes does in `tests/distributed/test_steps.py`."""

from __future__ import annotations

import parallel
import torch
from bits import bits, same_bits
from parallel import (
    Network,
    assert_held,
    fill_gradients,
    like,
    named,
    optimizer_of,
    pairs,
    part_of,
    steps,
    tuned,
    wrapped,
)
from torch.distributed.tensor.debug import CommDebugMode

import fused_merge as fm
from fused_merge.distributed import is_sharded, local_part
from fused_merge.optim.state import state_dtypes


def sizes(rank, kind):
    """Compare a model with one that is not sharded; return how many elements of each parameter a process holds."""
    own, whole = named(wrapped(tuned(), kind)), named(tuned().to(parallel.device()))
    for name, parameter in own.items():
        gathered = parameter.full_tensor() if is_sharded(parameter) else parameter
        assert same_bits(gathered, whole[name]), name
        assert same_bits(local_part(parameter), part_of(parameter, whole[name])), name
    return {name: local_part(parameter).numel() for name, parameter in own.items()}


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


def steps_of_a_sharded_delta(rank, kind, options):
    """Make tau of two models that are sharded as the trained one is, of which each process keeps what it holds."""
    ends = [wrapped(model, kind) for model in (Network(0), tuned())]
    reference = fm.ReferenceDelta.from_models(*ends)
    sharded, _, whole, theirs = pairs(kind, **options)
    ours = optimizer_of(sharded, reference, **options)
    assert reference.identity == theirs.reference_delta.identity
    steps(sharded, ours, 3)
    steps(whole, theirs, 3)
    assert_held(sharded, ours, whole, theirs)


def ulps(a, b):
    """How many numbers of their format lie between two tensors, at most."""
    if not a.numel():
        return 0
    patterns = [bits(x.detach()).long() for x in (a, b)]
    one, other = (torch.where(x < 0, -(x & 0x7FFFFFFF), x) for x in patterns)
    return int((one - other).abs().max())


def nearly_as_one_process(rank, kind, options):
    """Take a step beside the whole model; return the largest distance of weights and the norms of both."""
    sharded, ours, whole, theirs = pairs(kind, **options)
    steps(sharded, ours, 1)
    steps(whole, theirs, 1)
    far = max(ulps(local_part(p), part_of(p, named(whole)[name])) for name, p in named(sharded).items())
    return far, [optimizer.grad_norm and float(optimizer.grad_norm) for optimizer in (ours, theirs)]


def coefficients(rank, kind, options):
    """Return by how much the gradients c * tau of a step differ from those of one process, relatively."""
    sharded, ours, whole, theirs = pairs(kind, project="onto", project_on="gradient", **options)
    for model, optimizer in ((sharded, ours), (whole, theirs)):
        for name, parameter in named(model).items():
            # All terms of the sums have one sign, so that what is left of them is not chance.
            tau = optimizer.reference_delta.tensor(name)
            parameter.grad = like(parameter, (tau.abs().sqrt() + 1).copysign(tau))
        optimizer.step()
    far = [0.0]
    for name, parameter in named(sharded).items():
        expected = part_of(parameter, theirs.state[named(whole)[name]]["exp_avg"]).double()
        far += ((local_part(ours.state[parameter]["exp_avg"]) - expected) / expected).abs().flatten().tolist()
    return max(far)


def statistics(rank, kind, options):
    sharded, ours, whole, theirs = pairs(kind, stats_every=1, **options)
    steps(sharded, ours, 1)
    steps(whole, theirs, 1)
    return ours.merge_stats(), theirs.merge_stats()


def collectives(rank, kind, blocks, options):
    """Return how many collective operations a step of a model of some blocks takes, once its delta is bound."""
    model = wrapped(tuned(2, blocks=blocks), kind)
    optimizer = optimizer_of(model, parallel.delta(blocks=blocks), **options)
    steps(model, optimizer, 1)
    fill_gradients(model, 1)
    with CommDebugMode() as counted:
        optimizer.step()
    return counted.get_total_counts()
