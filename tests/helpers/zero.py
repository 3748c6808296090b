"""What each of two processes does with DeepSpeed on the CPU, for tests of ZeRO."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from bits import same_bits
from deltas import of_tensors
from torch import nn

import fused_merge as fm
from fused_merge.integrations.deepspeed import flat_tensors, pieces_of

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


def groups_of(model, trained_only=False):
    """Two groups, as with decay and without."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad or not trained_only]
    return [
        {"params": [(name, p) for name, p in named if p.ndim > 1], "weight_decay": 0.1},
        {"params": [(name, p) for name, p in named if p.ndim <= 1]},
    ]


def optimizer_of(model, cls="OnDAREAdamW", **options):
    options = {"lr": 1e-2, "alpha": 1e-2, "reserve_rate": 0.1} | options
    return getattr(fm, cls)(groups_of(model), reference_delta=delta(), **options)


def engine_of(model, optimizer, stage, zero, dtype=torch.float32, **config):
    os.environ["LOCAL_RANK"] = str(torch.distributed.get_rank())
    config |= {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def stretches(rank, stage, zero, dtype, config):
    """Compare what is said to stand in flat tensors with the parameters.

    Returns (group, name, first element, last) of each piece, and how many elements of padding there are.
    """
    model = Network(dtype)
    whole = {name: p.detach().clone().float() for name, p in model.named_parameters()}
    engine = engine_of(model, torch.optim.AdamW(groups_of(model)), stage, zero, dtype, **config)
    pieces = pieces_of(engine, engine.basic_optimizer.param_groups)
    found, padding = [], 0
    for number, flat in enumerate(flat_tensors(engine)):
        owned = torch.zeros(flat.tensor.shape, dtype=torch.bool)
        for name, local, fragment in pieces[flat.tensor]:
            assert not owned[local].any()
            owned[local] = True
            first = fragment.shard.elements.offset
            assert same_bits(flat.tensor.detach()[local], fragment.of(whole[name][fragment.box]))
            assert same_bits(flat.tensor.detach()[local], whole[name].flatten()[first : first + owned[local].numel()])
            assert fragment.shard.shape == whole[name].shape
            found.append((number, flat.group, name, first, first + owned[local].numel()))
        padding += (~owned).sum().item()
    return found, padding
