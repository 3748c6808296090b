"""What each of several processes does with FSDP2 through Accelerate, for `test_accelerate`: on CPUs, by force."""

from __future__ import annotations

import os
import runpy
from contextlib import contextmanager

import accelerate
import parallel
import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from bits import assert_same_bits
from parallel import Network, assert_held, fill_gradients, held, named, optimizer_of, part_of, steps, tuned
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fused_merge as fm
from fused_merge.distributed import local_part
from fused_merge.names import canonical_name


def plugin(*blocks, state_dict_type="SHARDED_STATE_DICT"):
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[*blocks],
        cpu_ram_efficient_loading=False,
        state_dict_type=state_dict_type,
    )


class ForcedAccelerator(Accelerator):
    """Accelerate chooses FSDP for GPUs only; all that it does then works on CPUs as well."""

    def __init__(self, *args, fsdp_plugin, **kwargs):
        super().__init__(*args, cpu=True, **kwargs)
        # Every AcceleratorState takes over what PartialState knows.
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": fsdp_plugin}


@contextmanager
def environment(rank):
    """What torchrun tells a process, and no state of Accelerate afterwards."""
    world = str(torch.distributed.get_world_size())
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    before = dict(os.environ)
    os.environ.update(told, OMP_NUM_THREADS="1", MASTER_ADDR="localhost", MASTER_PORT="29500")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        for state in (AcceleratorState, PartialState, GradientState):
            state._shared_state.clear()


OPTIONS = {"method": "onties", "merge_every": 3, "rounding": "stochastic"}


def groups_of(model):
    """Matrices decay and vectors do not."""
    pairs = [*model.named_parameters()]
    return [{"params": [p for p in pairs if p[1].ndim == n], "weight_decay": 0.1 * (n - 1)} for n in (1, 2)]


def prepared(seed=2, **options):
    accelerator = ForcedAccelerator(fsdp_plugin=plugin("Block", **options))
    model = tuned(seed)
    optimizer = optimizer_of(model, params=groups_of(model), **OPTIONS)
    return accelerator, *accelerator.prepare(model, optimizer)


def alone():
    model = tuned(2)
    return model, optimizer_of(model, params=groups_of(model), **OPTIONS)


def train(rank):
    """Take steps on fixed gradients, beside the whole model."""
    with environment(rank):
        _, model, optimizer = prepared()
        whole, theirs = alone()
        steps(model, optimizer, 4)
        steps(whole, theirs, 4)
        assert_held(model, optimizer.optimizer, whole, theirs)
        return [p.numel() for p in model.parameters()] == [p.to_local().numel() for p in model.parameters()]


def train_on_a_loss(rank):
    """Take real steps, and let one process repeat them with the gradients that they had, gathered."""
    with environment(rank):
        accelerator, model, optimizer = prepared()
        whole, theirs = alone()
        tokens = torch.randint(7, (4, 6), generator=torch.Generator().manual_seed(rank))
        losses = []
        for _ in range(4):
            loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), (tokens % 3).flatten())
            losses.append(loss.item())
            accelerator.backward(loss)
            for name, parameter in named(whole).items():
                parameter.grad = named(model)[name].grad.full_tensor()
            optimizer.step()
            theirs.step()
            optimizer.zero_grad()
        assert_held(model, optimizer.optimizer, whole, theirs)
        assert losses[-1] != losses[0]


def save(rank, folder, options):
    with environment(rank):
        accelerator, model, optimizer = prepared(**options)
        steps(model, optimizer, 4)
        before = held(model, optimizer.optimizer)
        accelerator.save_state(str(folder))
        assert_same_bits(held(model, optimizer.optimizer), before)


def resume(rank, folder, options):
    with environment(rank):
        accelerator, model, optimizer = prepared(seed=7, **options)
        accelerator.load_state(str(folder))
        whole, theirs = alone()
        steps(whole, theirs, 4)
        assert_held(model, optimizer.optimizer, whole, theirs)
        for of, by in ((model, optimizer), (whole, theirs)):
            steps(of, by, 3, first=4)
        assert_held(model, optimizer.optimizer, whole, theirs)


def wrong_delta(rank):
    """A delta of other names is refused at the first step, after the parameters were swapped."""
    with environment(rank):
        accelerator = ForcedAccelerator(fsdp_plugin=plugin("Block"))
        model = Network()
        model, optimizer = accelerator.prepare(model, optimizer_of(model, parallel.delta(blocks=1)))
        fill_gradients(model, 0)
        before = held(model, optimizer.optimizer)
        try:
            optimizer.step()
        except ValueError as error:
            assert_same_bits(held(model, optimizer.optimizer), before)
            return str(error)


def untied(seed):
    """A model whose tables FSDP2 and Accelerate can tell apart, and what fine-tuning made of it."""
    from tiny import llama

    model = llama(0, tied=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters() if seed else ():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def train_with_a_trainer(rank, kind, folder):
    """Train with Transformers or TRL, and repeat it on the whole model with the gradients that it had, gathered."""
    # Imported by the processes that need it, which takes them seconds.
    import trainers
    import transformers

    seen = []

    def record(optimizer, *_):
        if isinstance(optimizer, fm.MergingAdamW):
            grads = {}
            for group in optimizer.param_groups:
                grads |= {n: p.grad.full_tensor() for n, p in zip(group["param_names"], group["params"], strict=True)}
            seen.append(([group["lr"] for group in optimizer.param_groups], grads))

    reference = fm.ReferenceDelta.from_models(untied(0), untied(1))
    with environment(rank), pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.trainer, "Accelerator", ForcedAccelerator)
        sharding = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
        trainer = trainers.trainer_of(kind, folder / str(rank), untied(1), **sharding)
        fm.attach(trainer, reference, **trainers.MERGING)
        hook = register_optimizer_step_pre_hook(record)
        try:
            trainer.train()
        finally:
            hook.remove()
        model = untied(1)
        optimizer = fm.OnDAREAdamW(
            trainers.decay_groups(model),
            reference_delta=reference,
            betas=(0.9, 0.98),
            eps=1e-7,
            **trainers.MERGING,
        )
        for rates, grads in seen:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            for name, parameter in model.named_parameters():
                parameter.grad = grads[canonical_name(name)]
            optimizer.step()
        own = named(trainer.model)
        whole = {name: part_of(own[name], parameter.detach()) for name, parameter in model.named_parameters()}
        assert_same_bits({name: local_part(parameter.detach()) for name, parameter in own.items()}, whole)
        assert any(parameter.shape != local_part(parameter).shape for parameter in own.values())
    return len(seen)


def run_example(rank, script):
    """Run a script whose Accelerator is forced to shard, as it does on GPUs."""

    class Forced(ForcedAccelerator):
        def __init__(self):
            super().__init__(fsdp_plugin=plugin("LlamaDecoderLayer"))

        def prepare(self, *args):
            model, *others = super().prepare(*args)
            sharded.append(any(p.shape != local_part(p).shape for p in model.parameters()))
            return model, *others

        def end_training(self):
            """Leave the group of processes to other tests."""

    sharded = []
    with environment(rank), pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "Accelerator", Forced)
        runpy.run_path(str(script))
    return sharded
