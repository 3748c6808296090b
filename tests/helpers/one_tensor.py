"""An optimizer of a parameter or two, and its steps: what the tests of the eager code share."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import fused_merge as fm
from fused_merge.methods import METHODS

HYPER = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "alpha": 0.05}
ADAMW = {key: HYPER[key] for key in ("lr", "betas", "eps", "weight_decay")}


def joined(options):
    """The name of a case: its values."""
    return "-".join(str(value).removeprefix("torch.") for value in options.values())


def of_every_method(rate):
    """The options of each method, with a reserve rate where it has one."""
    return [{"method": method} | ({} if method == "onproj" else {"reserve_rate": rate}) for method in METHODS]


def draw(shape, scale=1.0, seed=0, dtype=torch.float32):
    """Normal numbers, the same in every dtype up to rounding."""
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def delta_of(taus):
    """The reference delta that these tensors are, or that this one of "w" is."""
    taus = taus if isinstance(taus, dict) else {"w": torch.as_tensor(taus)}
    return fm.ReferenceDelta.from_models({name: torch.zeros_like(tau) for name, tau in taus.items()}, taus)


def parameter(values, dtype=torch.float32):
    return nn.Parameter(torch.as_tensor(values, dtype=dtype).clone())


def optimizer_of(param, tau, method="ondare", name="w", **options):
    """An optimizer of `param`, called "w", whose delta is `tau`."""
    options = HYPER | {"impl": "eager"} | options
    return fm.MergingAdamW([(name, param)], reference_delta=delta_of(tau), method=method, **options)


def run(optimizer, steps, first=0):
    """Step with gradients that depend on the number of the step."""
    (param,) = optimizer.param_groups[0]["params"]
    for step in range(first, first + steps):
        param.grad = draw(param.shape, seed=1000 + step, dtype=torch.float64).to(param.dtype)
        optimizer.step()


def states(optimizer):
    """The parameter and its state by name."""
    (param,) = optimizer.param_groups[0]["params"]
    return {"param": param.detach(), **optimizer.state[param]}


def assert_near(ours, theirs, tolerance=None):
    """Fail where a tensor is not a numpy array up to rounding, as a share of its largest number."""
    tolerance = tolerance or (1e-6 if ours.dtype == torch.float32 else 1e-13)
    ours = ours.detach().cpu().double().numpy()
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
