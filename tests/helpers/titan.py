"""What each of several processes does with torchtitan's container of optimizers, for `test_torchtitan`."""

from __future__ import annotations

import re

import parallel
import torch
from bits import assert_same_bits
from parallel import OPTIONS, Network, assert_held, named, steps, tuned, wrapped
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torchtitan.components.optimizer import ParamGroupConfig

import fused_merge as fm
from fused_merge.distributed import local_part
from fused_merge.integrations.torchtitan import MergingOptimizersContainer, merging_adamw

ONTIES = OPTIONS | {"reserve_rate": 0.5, "merge_every": 3, "rounding": "stochastic"}


def container_of(model, mixed):
    """A container of one optimizer of ours, or of one for matrices with one of torch's for all else."""
    reference = parallel.delta()
    config = merging_adamw(reference, optimizer_name="OnTIESAdamW", **ONTIES)
    if mixed:
        config = MergingOptimizersContainer.Config(
            param_groups=[
                ParamGroupConfig(pattern=r"(bias|norm\.weight|gain)$", optimizer_name="AdamW"),
                ParamGroupConfig(pattern=r"blocks\.0", optimizer_name="OnTIESAdamW", optimizer_kwargs={"lr": 3e-3}),
                ParamGroupConfig(pattern=".*", optimizer_name="OnTIESAdamW"),
            ],
            implementation="for-loop",
            optimizer_factory_kwargs_by_name={"OnTIESAdamW": {"reference_delta": reference, **ONTIES}},
        )
    return config.build(model_parts=[model])


def optimizers_alone(model, mixed):
    """The same optimizers without a container, on a whole model."""
    pairs = [*named(model).items()]
    if not mixed:
        return [fm.OnTIESAdamW(pairs, reference_delta=parallel.delta(), **ONTIES)]
    small = [(n, p) for n, p in pairs if re.search(r"(bias|norm\.weight|gain)$", n)]
    first = [(n, p) for n, p in pairs if "blocks.0" in n and (n, p) not in small]
    rest = [pair for pair in pairs if pair not in small and pair not in first]
    groups = [{"params": first, "lr": 3e-3}, {"params": rest}]
    ours = fm.OnTIESAdamW(groups, reference_delta=parallel.delta(), **ONTIES)
    return [torch.optim.AdamW(small), ours]


class Together:
    """Optimizers as one, as far as these tests look."""

    def __init__(self, optimizers):
        self.optimizers = [*optimizers]

    @property
    def state(self):
        return {param: state for optimizer in self.optimizers for param, state in optimizer.state.items()}

    def step(self):
        for optimizer in self.optimizers:
            optimizer.step()


def train(rank, kind, mixed):
    model, whole = wrapped(tuned(2), kind), tuned(2)
    container, alone = container_of(model, mixed), Together(optimizers_alone(whole, mixed))
    assert len(container) == len(alone.optimizers)
    for of, by in ((model, container), (whole, alone)):
        steps(of, by, 4)
    assert_held(model, Together(container), whole, alone)


def weights_of(model):
    return {name: local_part(parameter.detach()).clone() for name, parameter in named(model).items()}


def save(rank, kind, mixed, folder):
    model = wrapped(tuned(2), kind)
    before = weights_of(model)
    # A checkpoint before the first step takes one, with gradients of zero.
    container_of(model, mixed).state_dict()
    assert_same_bits(weights_of(model), before)
    container = container_of(model, mixed)
    steps(model, container, 4)
    checkpoint.save({"model": get_model_state_dict(model), "optimizer": container}, checkpoint_id=folder)


def resume(rank, kind, mixed, folder):
    model, whole = wrapped(Network(7), kind), tuned(2)
    container, alone = container_of(model, mixed), Together(optimizers_alone(whole, mixed))
    weights = get_model_state_dict(model)
    checkpoint.load({"model": weights, "optimizer": container}, checkpoint_id=folder)
    set_model_state_dict(model, weights)
    steps(whole, alone, 4)
    assert_held(model, Together(container), whole, alone)
    for of, by in ((model, container), (whole, alone)):
        steps(of, by, 3, first=4)
    assert_held(model, Together(container), whole, alone)
