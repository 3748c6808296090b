"""A small model near another one, its gradients and its steps: what the tests of the optimizers share."""

from __future__ import annotations

import pytest
import torch
from bits import assert_same_bits
from device import DEVICE
from torch import nn

import fused_merge as fm

IMPLS = ["eager", "triton"]

STATEFUL = [
    (torch.float32, {}),
    (torch.float32, {"merge_every": 3, "weight_decay": 0.1}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master": "fp32", "merge_every": 3}),
    (torch.bfloat16, {"master": "split", "merge_every": 3}),
    (torch.bfloat16, {"rounding": "stochastic", "merge_every": 3}),
    (torch.float16, {"master": "fp32", "state_dtype": torch.float16}),
    (torch.float64, {"merge_every": 3, "state_dtype": torch.bfloat16}),
]
every_state = pytest.mark.parametrize(
    ("dtype", "options"), STATEFUL, ids=lambda value: str(value).removeprefix("torch.") if value else "plain"
)


class Model(nn.Module):
    def __init__(self, seed: int = 0, head: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 8)
        self.hidden = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        if head:
            self.head = nn.Linear(16, 3, bias=False)
        self.to(DEVICE)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(torch.tanh(self.hidden(self.embed(tokens)))))


def trained(seed: int = 1) -> nn.Module:
    """A model near `Model(0)`, as after fine-tuning."""
    model = Model(0)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


def run(optimizer, model, steps, first=0):
    for step in range(first, first + steps):
        fill_gradients(model, step)
        optimizer.step()


def snapshot(optimizer):
    """Every bit that an optimizer owns: parameters and states."""
    return [
        {key: value.detach().clone() for key, value in ({"param": p} | optimizer.state[p]).items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_same(a, b):
    """Same bits in parameters and in every state tensor."""
    assert_same_bits(snapshot(a), snapshot(b))


def optimizer_of(model, delta, method="ondare", **options):
    """An optimizer whose merges move every tensor, dense enough to see."""
    options = {"lr": 1e-2, "alpha": 0.1} | ({} if method == "onproj" else {"reserve_rate": 0.5}) | options
    return fm.MergingAdamW(model.named_parameters(), reference_delta=delta, method=method, **options)


def training(delta, method="ondare", dtype=torch.float32, **options):
    """A model and the optimizer that trains it."""
    model = trained().to(dtype)
    return model, optimizer_of(model, delta, method, **options)
