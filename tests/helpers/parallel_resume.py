"""Runs that torch.distributed.checkpoint saves and that go on elsewhere, for `tests/distributed/test_resume.py`."""

from __future__ import annotations

import parallel
import torch
from bits import assert_same_bits
from parallel import assert_held, held, optimizer_of, steps, tuned, wrapped
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)

from fused_merge.distributed import local_part

FROZEN = ("embed.weight", "blocks.0.up.weight")
WITHOUT_GRADIENT = ("blocks.1.down.bias", "blocks.0.up.weight")


def training(kind, case, *, seed=2, ours=True):
    """A model and the optimizer that trains it: one of ours, or torch's AdamW with what it knows of the options."""
    model = wrapped(tuned(seed, dtype=case.get("dtype", torch.float32)), kind)
    if case.get("frozen"):
        for name, parameter in parallel.named(model).items():
            parameter.requires_grad_(name not in FROZEN)
    pairs = [*model.named_parameters()]
    groups = [{"params": pairs}]
    if case.get("groups") == "two":
        groups = [{"params": [p for p in pairs if p[1].ndim == n], "weight_decay": 0.1 * (n - 1)} for n in (1, 2)]
    elif case.get("groups") == "empty":
        groups.append({"params": []})
    if ours:
        return model, optimizer_of(model, params=groups, **case.get("options", {}))
    if case.get("groups") == "empty":
        # torch takes no group without names beside one with names.
        groups[0]["params"] = [parameter for _, parameter in pairs]
    return model, torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.1)


def skipped(case):
    return WITHOUT_GRADIENT if case.get("without gradients") else ()


def run(model, optimizer, case, count, first=0):
    steps(model, optimizer, count, first, skipped(case))


def weights_of(model, optimizer):
    return {name: tensors["param"] for name, tensors in held(model, optimizer).items()}


def save(rank, kind, case, folder, flat, count, ours):
    model, optimizer = training(kind, case, ours=ours)
    run(model, optimizer, case, count)
    before = held(model, optimizer)
    weights, states = get_state_dict(model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat))
    assert_same_bits(held(model, optimizer), before)
    checkpoint.save({"model": weights, "optimizer": states}, checkpoint_id=folder)


def resume(rank, kind, case, folder, flat, count, ours, partial):
    """Go on where `save` ended, and compare with a run of one process that was not interrupted."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = training(kind, case, seed=7, ours=ours)
    before = weights_of(model, optimizer)
    weights, states = get_state_dict(model, optimizer, options=options)
    assert_same_bits(weights_of(model, optimizer), before)
    parts = {"model": weights, "optimizer": states}
    planner = checkpoint.DefaultLoadPlanner(allow_partial_load=partial)
    checkpoint.load(parts, checkpoint_id=folder, planner=planner)
    set_state_dict(
        model, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"], options=options
    )
    whole, alone = training("whole", case, ours=ours)
    for first, more in ((0, count), (count, 3)):
        if first:
            run(model, optimizer, case, more, first)
        run(whole, alone, case, more, first)
        for name in skipped(case):
            # The probe has made states at zero.
            state = optimizer.state.pop(parallel.named(model)[name], None)
            assert state is None or not local_part(state["exp_avg"]).any()
        assert_held(model, optimizer, whole, alone)


def probe(rank, kind, case):
    """Ask a fresh optimizer for its state dict, which takes a step with gradients of zero at a learning rate of 0."""
    model, optimizer = training(kind, case)
    before = weights_of(model, optimizer)
    get_optimizer_state_dict(model, optimizer)
    assert all(state["step"] == 1 for state in optimizer.state.values())
    assert_same_bits(weights_of(model, optimizer), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    # It trains as if it had not been asked.
    whole, alone = training("whole", case)
    for by in (optimizer, alone):
        for state in by.state.values():
            state["step"].zero_()
    run(model, optimizer, case, 3)
    run(whole, alone, case, 3)
    assert_held(model, optimizer, whole, alone)
