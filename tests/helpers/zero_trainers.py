"""Trainers of Transformers and TRL under DeepSpeed, for tests in two processes."""

from __future__ import annotations

import os

import torch
from accelerate.state import AcceleratorState
from bits import same_bits
from torch.optim.optimizer import register_optimizer_step_pre_hook
from trainers import MERGING, decay_groups, delta, policy, replayed, trainer_of
from zero import config_of, weights_of

import fused_merge as fm
from fused_merge.integrations.deepspeed import pieces_of


def ready(rank):
    """Does nothing, once this file is imported."""


def attached(trainer):
    fm.attach(trainer, delta(), **MERGING)


def by_factory(trainer):
    trainer.optimizer_cls_and_kwargs = fm.optimizer_factory(trainer.args, reference_delta=delta(), **MERGING)
    trainer.add_callback(fm.DeepSpeedCallback(trainer))


def differing(rank, kind, stage, zero, way, folder):
    """The tensors that a trainer under DeepSpeed makes other than the same gradients do in one process."""
    os.environ["LOCAL_RANK"] = str(rank)
    AcceleratorState._reset_state(True)
    config = config_of(stage, zero) | {"train_micro_batch_size_per_gpu": "auto"}
    trainer = trainer_of(kind, folder, deepspeed=config, max_grad_norm=0.0)
    {"attach": attached, "factory": by_factory}[way](trainer)
    calls = []

    def record(optimizer, *_):
        calls.extend(
            (group["lr"], flat, flat.grad.clone()) for group in optimizer.param_groups for flat in group["params"]
        )

    hook = register_optimizer_step_pre_hook(record)
    try:
        trainer.train()
    finally:
        hook.remove()

    engine = trainer.model_wrapped
    pieces = pieces_of(engine, engine.basic_optimizer.param_groups)
    count = len(calls) // trainer.state.global_step
    seen = []
    for step in range(trainer.state.global_step):
        grads = {name: torch.zeros_like(param) for name, param in policy().named_parameters()}
        for _, flat, grad in calls[step * count :][:count]:
            for name, local, fragment in pieces[flat]:
                first, held = fragment.shard.elements.offset, grad[local]
                grads[name].view(-1)[first : first + held.numel()] = held
        for grad in grads.values():
            torch.distributed.all_reduce(grad)
        order = [name for group in decay_groups(policy()) for name, _ in group["params"]]
        seen.append(([calls[step * count][0]] * 2, [grads[name] for name in order]))
    expected, weights = replayed(seen), weights_of(engine)
    assert not any(same_bits(expected[name], param.detach()) for name, param in policy().named_parameters())
    return [name for name in expected if not same_bits(expected[name], weights[name])]


def differing_if_resumed(rank, stage, folder):
    """The tensors of a trainer's run that differ if it is interrupted after two of three steps."""
    os.environ["LOCAL_RANK"] = str(rank)
    results = []
    for checkpoint in (None, f"{folder}/checkpoint-2"):
        AcceleratorState._reset_state(True)
        config = config_of(stage, {}) | {"train_micro_batch_size_per_gpu": "auto"}
        options = {"save_strategy": "steps", "save_steps": 2, "max_grad_norm": 0.0}
        trainer = trainer_of("plain", folder, deepspeed=config, **options)
        attached(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        results.append(weights_of(trainer.model_wrapped))
    one, other = results
    assert not any(same_bits(one[name], param.detach()) for name, param in policy().named_parameters())
    return [name for name in one if not same_bits(one[name], other[name])]
