"""What each of two processes does with DeepSpeed on the CPU, for tests of ZeRO."""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import pytest
import torch
from bits import same_bits
from deltas import of_tensors
from torch import nn

import fused_merge as fm
from fused_merge.integrations.deepspeed import flat_tensors, injected, pieces_of

# DeepSpeed would compile an all-reduce in shared memory first, for most of a minute.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.utils.logger.setLevel("ERROR")

STEPS = 4


class Network(nn.Module):
    """No size is even; the head is tied, and one tensor is frozen."""

    def __init__(self, dtype=torch.float32):
        torch.manual_seed(0)
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.frozen = nn.Linear(7, 7).requires_grad_(False)
        self.linear = nn.Linear(7, 7)
        self.gain = nn.Parameter(torch.rand(1) + 0.5)
        self.norm = nn.LayerNorm(7)
        self.to(dtype)

    def forward(self, tokens):
        x = self.embed(tokens)
        x = x + self.gain * torch.tanh(self.linear(self.frozen(x)))
        return self.norm(x) @ self.embed.weight.T


def delta():
    torch.manual_seed(1)
    return of_tensors({name: 0.1 * torch.randn_like(p) for name, p in Network().named_parameters()})


def groups_of(model, of_vectors=()):
    """Two groups, as with decay and without."""
    named = list(model.named_parameters())
    vectors = [len(getattr(p, "ds_shape", p.shape)) <= 1 for _, p in named]
    return [
        {
            "params": [pair for pair, is_vector in zip(named, vectors, strict=True) if not is_vector],
            "weight_decay": 0.1,
        },
        {"params": [pair for pair, is_vector in zip(named, vectors, strict=True) if is_vector], **dict(of_vectors)},
    ]


def optimizer_of(model, cls="OnDAREAdamW", of_vectors=(), **options):
    options = {"lr": 1e-2, "alpha": 1e-2, "reserve_rate": 0.1} | options
    options = {name: value for name, value in options.items() if value is not None}
    return getattr(fm, cls)(groups_of(model, of_vectors), reference_delta=delta(), **options)


def config_of(stage, zero, dtype=torch.float32, **config):
    return config | {
        "train_micro_batch_size_per_gpu": 1,
        # 1.0 unless it is said.
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def engine_of(model, optimizer, config):
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def loss_of(model, step):
    """The same on all processes, so that the mean of their gradients is the gradient of one."""
    tokens = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())


def train(engine, steps):
    for step in steps:
        engine.backward(loss_of(engine, step))
        engine.step()


def trained_alone(dtype, steps, **options):
    """The weights after training without DeepSpeed, with fp32 masters as it has them."""
    model = Network(dtype)
    optimizer = optimizer_of(model, **options, **({"master": "fp32"} if dtype == torch.bfloat16 else {}))
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}, optimizer


def weights_of(engine):
    """The weights, gathered under ZeRO 3."""
    params = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(params, enabled=engine.zero_optimization_stage() == 3):
        return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


def bound_engine(config, dtype, options, in_parts=False):
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    with deepspeed.zero.Init(config_dict_or_path=config) if in_parts else nullcontext():
        model = Network(dtype)
    engine = engine_of(model, optimizer_of(model, **options), config)
    fm.bind_deepspeed(engine)
    return engine


def differing(rank, config, dtype, options, in_parts=False, steps=range(4)):
    """The tensors that training with DeepSpeed makes other than training without."""
    engine = bound_engine(config, dtype, options, in_parts)
    train(engine, steps)
    weights = weights_of(engine)
    alone, _ = trained_alone(dtype, steps, **options)
    assert not same_bits(alone["linear.weight"], dict(Network(dtype).named_parameters())["linear.weight"].detach())
    return [name for name in alone if not same_bits(weights[name], alone[name])]


def distance(rank, config, options):
    """How far the weights are from those of training without DeepSpeed, in their own precision."""
    engine = bound_engine(config, torch.float32, options)
    train(engine, range(1))
    alone, _ = trained_alone(torch.float32, range(1), **options)
    return max(
        ((weights - alone[name]).abs() / torch.finfo().eps / alone[name].abs().clamp(min=1e-3)).max().item()
        for name, weights in weights_of(engine).items()
    )


def statistics(rank, config, dtype, options):
    """What the last merge that was looked at did, with DeepSpeed and without."""
    engine = bound_engine(config, dtype, options)
    train(engine, range(4))
    _, optimizer = trained_alone(dtype, range(4), **options)
    return engine.basic_optimizer.merge_stats(), optimizer.merge_stats()


def resumed(rank, config, dtype, folder, bind_first):
    """What differs between a run that is interrupted after two of four steps and one that is not."""
    engine = bound_engine(config, dtype, {})
    train(engine, range(2))
    engine.save_checkpoint(folder)
    train(engine, range(2, 4))

    model = Network(dtype)
    again = engine_of(model, optimizer_of(model), config)
    if bind_first:
        fm.bind_deepspeed(again)
    again.load_checkpoint(folder)
    if not bind_first:
        fm.bind_deepspeed(again)
    train(again, range(2, 4))
    one, other = weights_of(engine), weights_of(again)
    names = [name for name in one if not same_bits(one[name], other[name])]
    states, others = engine.basic_optimizer.state.values(), again.basic_optimizer.state.values()
    for state, same in zip(states, others, strict=True):
        assert set(state) == set(same) == {"step", "exp_avg", "exp_avg_sq"}
        names += [key for key in state if not same_bits(state[key], same[key])]
    return names


def unbound(rank, config, dtype):
    """The error of the first step of an optimizer that was not bound, and whether initialize moved the weights."""
    model = Network(dtype)
    engine = engine_of(model, optimizer_of(model), config)
    untouched = Network(dtype).state_dict()
    moved = [name for name, weights in weights_of(engine).items() if not same_bits(weights, untouched[name])]
    with pytest.raises(ValueError, match="bind_deepspeed") as caught:
        train(engine, range(1))
    return str(caught.value), moved


def schedule_of(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))


def bare_groups(model):
    """Groups without names, as frameworks make them."""
    return [{**group, "params": [param for _, param in group["params"]]} for group in groups_of(model)]


def hard_coded(model, config, way):
    """A framework that offers no choice of an optimizer, and has a reference model."""
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    without = {key: value for key, value in config.items() if key not in ("optimizer", "zero_optimization")}
    assert deepspeed.initialize(model=Network().eval(), config=without)[1] is None
    if way == "optimizer":
        optimizer = torch.optim.AdamW(bare_groups(model), lr=3e-3, betas=(0.8, 0.95), weight_decay=0.0)
        return deepspeed.initialize(None, model, optimizer, lr_scheduler=schedule_of(optimizer), config=config)[0]
    config = {**config, "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "betas": [0.8, 0.95]}}}
    args = argparse.Namespace(deepspeed_config=config)
    return deepspeed.initialize(args, model, model_parameters=iter(bare_groups(model)), lr_scheduler=schedule_of)[0]


def differing_if_injected(rank, config, way):
    """The tensors that differ from training alone if an optimizer is injected into a framework."""
    options = {"reference_delta": delta(), "alpha": 1e-2, "reserve_rate": 0.1}
    initialize = deepspeed.initialize
    with injected(fm.OnTIESAdamW, **options):
        engine = hard_coded(Network(), config, way)
    assert deepspeed.initialize is initialize
    train(engine, range(4))
    weights = weights_of(engine)

    model = Network()
    optimizer = fm.OnTIESAdamW(groups_of(model), lr=3e-3, betas=(0.8, 0.95), **options)
    schedule = schedule_of(optimizer)
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        schedule.step()
    return [name for name, param in model.named_parameters() if not same_bits(weights[name], param.detach())]


def refused(rank, config, foreign, options):
    model = Network()
    optimizer = torch.optim.AdamW(model.named_parameters()) if foreign else optimizer_of(model, **options)
    fm.bind_deepspeed(engine_of(model, optimizer, config))


def lacking(rank, config):
    """Bind a delta that lacks a tensor of the last group."""
    model, some = Network(), delta()
    some = of_tensors({name: some.tensor(name) for name in some.names if name != "norm.bias"})
    optimizer = fm.OnDAREAdamW(groups_of(model), reference_delta=some, lr=1e-2)
    fm.bind_deepspeed(engine_of(model, optimizer, config))


def renamed(rank, config, with_frozen):
    """The tensors that differ from training alone if the optimizer has names of its own."""
    model = Network()
    known, own = (
        delta(),
        {f"policy.{name}": p for name, p in model.named_parameters() if p.requires_grad or with_frozen},
    )
    tau = of_tensors({name: known.tensor(name.removeprefix("policy.")) for name in own})
    optimizer = fm.OnDAREAdamW(own.items(), reference_delta=tau, lr=1e-2, alpha=1e-2)
    engine = engine_of(model, optimizer, config)
    fm.bind_deepspeed(engine)
    train(engine, range(2))
    weights, model = weights_of(engine), Network()
    own = [(f"policy.{name}", p) for name, p in model.named_parameters()]
    optimizer = fm.OnDAREAdamW(own, reference_delta=tau, lr=1e-2, alpha=1e-2, missing="plain")
    for step in range(2):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return [name for name, p in model.named_parameters() if not same_bits(weights[name], p.detach())]


def stretches(rank, config, dtype):
    """Compare what is said to stand in flat tensors with the parameters.

    Returns (flat tensor, group, name, first element, last) of each piece, and how many elements of padding there are.
    """
    model = Network(dtype)
    whole = {name: p.detach().clone().float() for name, p in model.named_parameters()}
    engine = engine_of(model, torch.optim.AdamW(groups_of(model)), config)
    pieces = pieces_of(engine, engine.basic_optimizer.param_groups)
    found, padding = [], 0
    for number, flat in enumerate(flat_tensors(engine)):
        owned = torch.zeros(flat.tensor.shape, dtype=torch.bool)
        for name, local, fragment in pieces[flat.tensor]:
            assert not owned[local].any()
            owned[local] = True
            first, held = fragment.shard.elements.offset, owned[local].numel()
            assert same_bits(flat.tensor.detach()[local], fragment.of(whole[name][fragment.box]))
            assert same_bits(flat.tensor.detach()[local], whole[name].flatten()[first : first + held])
            assert fragment.shard.shape == whole[name].shape
            found.append((number, flat.group, name, first, first + held))
        padding += (~owned).sum().item()
    return found, padding


def sgd_of(named, decay=0.1):
    groups = [[(n, p) for n, p in named if p.requires_grad and (p.ndim > 1) == matrices] for matrices in (True, False)]
    return torch.optim.SGD([{"params": groups[0], "weight_decay": decay}, {"params": groups[1]}], lr=1e-2, momentum=0.9)


def around(optimizer, options):
    return fm.OnlineMerging(optimizer, reference_delta=delta(), **{"alpha": 1e-2, "reserve_rate": 0.1} | options)


def differing_around(rank, config, dtype, options, wrap_first):
    """The tensors that merging around SGD under DeepSpeed makes other than without, on fp32 masters as it has them."""
    model = Network(dtype)
    # In the step with which it makes states for 16-bit weights, DeepSpeed has SGD decay the weights.
    decay = 0.0 if (config["zero_optimization"]["stage"], dtype) == (0, torch.bfloat16) else 0.1
    optimizer = sgd_of(list(model.named_parameters()), decay)
    merging = around(optimizer, options) if wrap_first else None
    engine = engine_of(model, optimizer, config)
    merging = merging or around(engine.optimizer, options)
    fm.bind_deepspeed(engine)
    train(engine, range(4))
    if config["zero_optimization"]["stage"] < 3:
        assert {own["step"] for own in merging.state_dict()["state"].values()} == {4}

    model = Network(dtype)
    masters = {name: nn.Parameter(p.detach().float(), p.requires_grad) for name, p in model.named_parameters()}
    optimizer = sgd_of(list(masters.items()), decay)
    around(optimizer, options)
    for step in range(4):
        model.zero_grad()
        loss_of(model, step).backward()
        for name, p in model.named_parameters():
            masters[name].grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(masters[name])
    alone, found = dict(model.named_parameters()), weights_of(engine)
    assert not same_bits(
        alone["linear.weight"].detach(), dict(Network(dtype).named_parameters())["linear.weight"].detach()
    )
    return [name for name in alone if not same_bits(found[name], alone[name].detach())]


def unbound_around(rank, config, wrap_first):
    """The error of a step of an optimizer that is merged around and was not bound."""
    model = Network()
    optimizer = sgd_of(list(model.named_parameters()))
    if wrap_first:
        around(optimizer, {})
    engine = engine_of(model, optimizer, config)
    if not wrap_first:
        around(engine.optimizer, {})
    with pytest.raises(ValueError, match="bind_deepspeed") as caught:
        train(engine, range(1))
    return str(caught.value)


def differing_by_config(rank, config):
    """The tensors that merging around the AdamW of a configuration makes other than around torch's."""
    options = {"lr": 1e-2, "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.0}
    model = Network()
    config = config | {"optimizer": {"type": "AdamW", "params": options | {"torch_adam": True}}}
    os.environ["LOCAL_RANK"] = str(rank)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
    fm.OnlineMerging(engine.optimizer, reference_delta=delta(), names_of=engine.module, alpha=1e-2, reserve_rate=0.1)
    fm.bind_deepspeed(engine)
    train(engine, range(4))

    model = Network()
    optimizer = torch.optim.AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], **options)
    around(optimizer, {})
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    found = weights_of(engine)
    return [name for name, p in model.named_parameters() if not same_bits(found[name], p.detach())]
